# SPDX-License-Identifier: Apache-2.0
"""What ``--help`` says beyond the options: groups, the words of a value, examples and exit statuses."""

from __future__ import annotations

from vmm.commands.cli import COMMANDS

_OVERVIEW = {
    "Run a VM": ("run", "config", "pull", "check", "lab"),
    "Sandboxes": ("sandbox", "exec", "cp"),
    "Under a runtime": ("serve", "jailer", "link", "prepare"),
    "While a VM runs": ("ps", "attach", "logs", "stop", "ctl", "vsock"),
}

# By subcommand: the options under a title; the others stay with --help.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "run": {
        "boot": ("--initrd", "--cmdline", "--append", "--protocol", "--unpack", "--restore"),
        "processor and memory": ("--cpus", "--memory", "--balloon"),
        "devices": ("--disk", "--share", "--net", "--vsock", "--rng", "--console", "--virtio-console", "--poll"),
        "host": ("--kvm", "--no-seccomp", "--any-kernel", "--lab"),
        "print or write the configuration": ("--write-config", "--dry-run", "--verbose"),
    },
    "serve": {
        "API and VM": ("--api-sock", "--id", "--config-file", "--no-api", "--http-api-max-payload-size"),
        "logs and metrics": (
            "--log-path", "--level", "--module", "--show-level", "--show-log-origin", "--metrics-path", "--boot-timer",
            "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us",
        ),
        "metadata service": ("--metadata", "--mmds-size-limit"),
        "system call filters": ("--no-seccomp", "--seccomp-filter"),
        "information": ("--version", "--snapshot-version", "--describe-snapshot"),
    },
    "jailer": {
        "required": ("--id", "--exec-file", "--uid", "--gid"),
        "the jail": ("--chroot-base-dir", "--netns", "--new-pid-ns", "--daemonize", "--version"),
        "limits": ("--cgroup", "--cgroup-version", "--parent-cgroup", "--resource-limit"),
    },
}  # fmt: skip

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "pyvmm run debian",
        "pyvmm run debian --cpus 4 --memory 2G --net user --share code=.,ro",
        "pyvmm run vmlinuz root.img --initrd initrd.img --disk data.img,queues=2,iops=500",
        "pyvmm run debian --console unix:box.console &",
        "pyvmm run vmlinuz root.img --dry-run",
    ),
    "config": ("pyvmm config show", "pyvmm config show debian --cpus 4"),
    "serve": (
        "pyvmm serve --api-sock /run/vm.sock",
        "pyvmm serve --no-api --config-file vm.json",
    ),
    "jailer": ("pyvmm jailer --id vm1 --exec-file /usr/local/bin/firecracker --uid 1000 --gid 1000 -- --level Info",),
    "pull": ("pyvmm pull --list", "pyvmm pull debian", "pyvmm pull debian --size 4G --packages python3,curl"),
    "ctl": (
        "pyvmm ctl --api-sock /run/vm.sock status",
        "pyvmm ctl --api-sock /run/vm.sock drive data --path new.img",
        "pyvmm ctl --api-sock /run/vm.sock snapshot /var/lib/snapshots/one",
    ),
    "link": ("pyvmm link firecracker /usr/local/bin",),
    "prepare": ("pyvmm prepare", "pyvmm prepare --remove"),
    "sandbox": (
        "pyvmm sandbox debian",
        "pyvmm sandbox --memory 1G --mount /work=. --timeout 60 debian sh -c 'make -C /work test'",
        "pyvmm sandbox --name box --wait debian",
    ),
    "exec": ("pyvmm exec box", "pyvmm exec -u nobody -e LANG=C box id"),
    "cp": ("pyvmm cp data.csv box:/tmp", "pyvmm cp box:/var/log logs"),
    "ps": ("pyvmm ps", "pyvmm ps --json", "pyvmm ps --quiet"),
    "attach": ("pyvmm attach debian", "pyvmm attach /run/user/1000/box.console"),
    "stop": ("pyvmm stop box", "pyvmm stop --timeout 60 4242"),
    "logs": ("pyvmm logs box", "pyvmm logs --follow box"),
    "vsock": ("pyvmm vsock /run/vm.vsock 1024",),
    "check": ("pyvmm check",),
    "lab": ("pyvmm lab -- ls -l /dev/kvm", 'pyvmm lab --write "$PWD" -- sh -c "pyvmm check > report"'),
    "completion": (
        "pyvmm completion bash > ~/.local/share/bash-completion/completions/pyvmm",
        'pyvmm completion zsh > "${fpath[1]}/_pyvmm"',
        "pyvmm completion fish > ~/.config/fish/completions/pyvmm.fish",
    ),
}  # fmt: skip

_USUAL = {"0": "done", "1": "the host failed", "2": "a mistake in the arguments"}
_GUEST = {
    "80": "the guest rebooted",
    "81": "the guest panicked",
    "82": "triple fault",
    "83": "KVM internal error",
    "84": "KVM entry failed",
}
_COMMAND = {
    "0 to 255": "the command's own",
    "1": "the sandbox failed, or ended",
    "2": "a mistake in the arguments",
    "126": "the command cannot be executed",
    "127": "it was not found",
    "128 + N": "signal N ended it",
}
_STATUSES: dict[str, dict[str, str]] = {
    "run": {
        "0": "the guest powered off",
        "N": "the guest wrote N to the exit port, 0xf4",
        "1": "the host failed",
        "2": "a mistake in the arguments",
        **_GUEST,
        "130": "ended from the keyboard, or by SIGTERM",
    },
    "serve": {
        "0": "the VM ended, also by a signal",
        "N": "the guest wrote N to the exit port, at most 127",
        "1": "the host failed, or the configuration cannot run",
        "148 to 157": "ended by a signal of a fault, as Firecracker",
        "152": "an option has an invalid value",
        "153": "a mistake in the arguments",
    },
    "jailer": {"0": "done", "1": "the jail could not be made", "others": "those of pyvmm serve"},
    "sandbox": _COMMAND,
    "exec": _COMMAND,
    "ctl": {"0": "done", "1": "the API refused the request, or does not answer", "2": "a mistake in the arguments"},
    "attach": {
        "0": "left by Ctrl-], or the VM has ended",
        "1": "another client has taken the console, or the host failed",
        "2": "a mistake in the arguments",
        "128 + N": "signal N ended it",
    },
    "check": {"0": "a VM can run", "1": "a VM cannot run", "2": "a mistake in the arguments"},
    "lab": {"0 to 255": "the command's own", "1": "the lab failed", "2": "a mistake in the arguments"},
}


def _table(lines: dict[str, str], width: int) -> list[str]:
    return [f"  {name:{width}}{text}" for name, text in lines.items()]


def epilog(name: str) -> str:
    """What stands below the options in the help of the subcommand `name`."""
    parts = []
    if name == "run":
        from vmm.config.devices import DEVICES

        parts += [[f"words of --{one.TITLE}:", *_table(words, 17)] for one in DEVICES if (words := one.words())]
    if name == "jailer":
        parts.append(["Options after -- are for pyvmm serve."])
    if name in _EXAMPLES:
        parts.append(["examples:", *(f"  {line}" for line in _EXAMPLES[name])])
    parts.append(["exit status:", *_table(_STATUSES.get(name, _USUAL), 13)])
    return "\n\n".join("\n".join(part) for part in parts)


def overview() -> str:
    """The help of ``pyvmm`` itself."""
    lines = ["usage: pyvmm COMMAND ...", "", "A KVM virtual machine monitor for Linux micro-VMs."]
    grouped = {name for names in _OVERVIEW.values() for name in names}
    others = tuple(name for name in COMMANDS if name not in grouped)
    width = max(map(len, COMMANDS)) + 2
    for title, names in (_OVERVIEW | {"Other commands": others}).items():
        lines += ["", f"{title}:", *_table({name: COMMANDS[name] for name in names}, width)]
    lines += ["", "examples:", "  pyvmm pull debian && pyvmm run debian", "  pyvmm run vmlinuz root.img --memory 2G"]
    lines += ["", "exit status:", *_table(_USUAL, 4), "", "pyvmm COMMAND --help shows more."]
    return "\n".join(lines) + "\n"
