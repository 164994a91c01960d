"""What routers do on data and texts, what that says of them, two adapters side by side, and what an export costs."""
