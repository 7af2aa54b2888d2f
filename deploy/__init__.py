"""What runs a swarm in the open: images, units, dashboards, alert rules."""
