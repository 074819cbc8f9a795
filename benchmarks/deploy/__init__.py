"""Real silos: keys and certificates, checks, runs over a SuperLink, and the compose file's services as processes."""
