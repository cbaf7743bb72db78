"""The paper's tables, and Table 8."""
