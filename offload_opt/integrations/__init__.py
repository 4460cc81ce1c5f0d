"""What makes offload_opt work inside other frameworks. Each module imports its framework when it is first used."""
