"""`python -m adalora_scale` is `adalora-scale`."""

import sys

from adalora_scale.cli import main

sys.exit(main())
