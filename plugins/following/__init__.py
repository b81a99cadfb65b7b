"""Following: where a real server listens for the services that follow another."""
