"""The run configuration: schema, loading, validation."""
