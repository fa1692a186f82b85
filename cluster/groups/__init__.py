"""Groups of actors that the driver calls as one, and how they outlive failures."""
