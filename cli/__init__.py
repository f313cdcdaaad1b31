"""Behind the scripts: the OpenAPI document, a prediction without a server, the HTTP server."""
