"""What stands behind the Model boundary."""
