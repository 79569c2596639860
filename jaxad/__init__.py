"""jaxad: image anomaly detection in pure-functional JAX."""
