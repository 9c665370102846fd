"""What flows through every axis, gathered from inputs as moments."""
