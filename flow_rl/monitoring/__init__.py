"""What to watch while a policy trains: reward hacking, drift, update direction."""
