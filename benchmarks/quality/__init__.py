"""Does it distil? All methods from one start, on a real task that fits two CPU cores."""
