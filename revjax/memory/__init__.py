"""What a function needs of memory and arithmetic, by the compiler's own account.

`revjax.memory_report` says it of any function, and `python -m revjax.memory` of the training step
of a network.
"""

from revjax.memory.report import MemoryReport as MemoryReport
from revjax.memory.report import memory_report as memory_report
