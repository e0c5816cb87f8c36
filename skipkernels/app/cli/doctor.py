"""`skipkernels doctor`."""

from __future__ import annotations

import dataclasses

from skipkernels.app.console import Terminal


@dataclasses.dataclass(frozen=True)
class DoctorCommand:
    """Print versions, devices, and the kernel of each operator on each device."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Print the tables. Returns 0."""
        import importlib.metadata
        import platform

        import torch
        from rich.table import Table

        import skipkernels

        versions = Table("part", "version", title="skipkernels doctor")
        versions.add_row("skipkernels", skipkernels.__version__)
        versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
        for package in ("torch", "triton", "open_clip_torch", "torchvision", "safetensors", "xformers"):
            try:
                versions.add_row(package, importlib.metadata.version(package))
            except importlib.metadata.PackageNotFoundError:
                versions.add_row(package, "not installed")
        versions.add_row("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
        for index in range(torch.cuda.device_count()):
            versions.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
        if not torch.cuda.is_available():
            built = torch.version.cuda and f"; torch is built for CUDA {torch.version.cuda}, its CPU build is smaller"
            versions.add_row("cuda", f"no device{built or ''}")
        out.print(versions)
        kernels = Table("operator", "device", "kernel", "why not a faster one", "computed by plain PyTorch")
        for operator, devices in skipkernels.backends().items():
            for device, backend in devices.items():
                if device == "cuda" and not torch.cuda.is_available():
                    continue
                kernels.add_row(operator, device, backend.kernel, backend.reason, backend.fallback_cases)
        out.print(kernels)
        return 0
