"""What routers do on data, and what an export costs."""
