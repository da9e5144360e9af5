"""The shell around the coordinator: everything that talks to Ray, and the only place that imports it."""
