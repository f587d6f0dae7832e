"""What runs in the Ray cluster: the application builder, the replica, routing and metrics export."""
