"""What speculation earns: acceptance statistics."""
