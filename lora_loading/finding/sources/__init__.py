"""Where LoRAs lie: a module a service, which turns a reference into a source. Asks the service, downloads nothing."""
