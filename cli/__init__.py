"""What the scripts run: the OpenAPI document, a prediction without a server, the server."""
