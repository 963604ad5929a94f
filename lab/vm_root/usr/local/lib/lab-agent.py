"""Runs what the lab asks for: one JSON object per line on a virtio port, one as the answer."""

import json
import subprocess

with open("/dev/virtio-ports/cmd", "r+b", buffering=0) as port:
    pending = b""
    while True:
        pending += port.read(4096) or b""
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            request = json.loads(line)
            try:
                done = subprocess.run(
                    ["/bin/sh", "-c", request["command"]],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=request["timeout"],
                    check=False,
                )
                output, status = done.stdout.decode(errors="replace"), done.returncode
            except subprocess.TimeoutExpired as error:
                output, status = (error.stdout or b"").decode(errors="replace"), 124
            answer = {"id": request["id"], "output": output, "status": status}
            unsent = json.dumps(answer).encode() + b"\n"
            while unsent:
                unsent = unsent[port.write(unsent) :]
