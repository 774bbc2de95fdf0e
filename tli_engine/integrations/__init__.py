"""Other code bases on this engine: accelerated layers, lazy hidden states, scripts run as they are."""
