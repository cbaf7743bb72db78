"""What training takes of a device's memory."""
