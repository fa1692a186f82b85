"""What each actor needs of the devices' memory, and whether it fits."""
