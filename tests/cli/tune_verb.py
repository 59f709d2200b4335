"""``offload tune`` in the tests: a script that leaves a mark wherever it ends."""

from pathlib import Path

SCRIPT = """
import atexit, sys, torch
from pathlib import Path
from torch import nn
here = Path(__file__).parent
atexit.register(lambda: (here / "at-exit").write_text(""))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(300, 500)
        self.b = nn.Linear(500, 300)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
try:
    for step in range(int(sys.argv[1])):
        x = torch.randn(64, 300)
        ((model(x) - x) ** 2).mean().backward()
        BEHIND_BACKWARD
        optimizer.step()
        optimizer.zero_grad()
    (here / "result").write_text("")
except BaseException:
    (here / "caught").write_text("")
    raise
finally:
    (here / "finally").write_text("")
"""


def write_script(folder: Path, behind_backward: str = "pass", text: str = SCRIPT) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "train.py"
    file.write_text(text.replace("BEHIND_BACKWARD", behind_backward))
    return file
