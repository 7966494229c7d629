"""How long a test waits for what must happen, whatever else the machine does."""

GUARD_S = 600
"""After which a test gives up; on an idle machine nothing takes a tenth of it."""
