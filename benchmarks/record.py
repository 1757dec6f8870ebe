"""Where the figures of benchmarks go, and what they were measured on."""

import datetime
import platform
from pathlib import Path
from typing import Any

from revjax.training.summary import device_name, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def environment() -> dict[str, Any]:
    """Of a record of figures: when, on what and with what they were measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
