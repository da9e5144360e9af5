"""raylaunch."""
