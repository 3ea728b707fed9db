"""What the router decides, pure: time comes in as an argument, nothing here touches network or wire."""
