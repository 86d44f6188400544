//! The one table of instance configuration keys: name or wildcard, type, who has it, default, live or not, text. Parser,
//! validation, documentation, CLI help and `/1.0/metadata/configuration` come from it.

use crate::{
    ByteSize, Config, Error, Result,
    board::text as of_board,
    error::nearest,
    instance::InstanceKind,
    keys_container, keys_machine, maximum, schedule, screens,
    spec::{KERNEL_LIMITS, Limits, MemoryLimit},
    threads::{self, text},
};

pub use crate::key_row::{Key, KeyScope, KeyType};
pub use crate::key_values::{
    flag, optional_flag, parse_allowance, parse_bool, parse_cpus, parse_kernel_limit, parse_memory,
    parse_nodes, parse_swap,
};
pub use keys_container::{cloud_init, environment, guest_api, security};

use crate::{key_row::key, key_values::demand_memory};
use KeyScope::{Any, Container, VirtualMachine};
use KeyType::{
    Allowance, Bool, Cpus, Integer, KernelLimit, Memory, Nodes, OneOf, Pattern, Schedule, Size, Span, Swap,
    Text,
};

/// What comes of a machine whose system crashed.
pub const CRASH_ACTION: &str = "boot.crash_action";
const CRASH: &str = "What comes of a machine whose system tells that it crashed (hardware.panic): it stops, or it halts, to be looked at.";
const HUGE_PAGES: &str =
    "Memory in huge pages of this size, where the host's kernel has them and their control group.";

/// The table, by name.
pub const INSTANCE_KEYS: &[Key] = &[
    key(
        "boot.autorestart",
        Bool,
        Any,
        "false",
        true,
        "Start the instance again when it crashed, each time a little later.",
    ),
    key("boot.autostart", Bool, Any, "last state", true, "Start the instance when its host starts."),
    key(
        "boot.autostart.delay",
        Integer(0, 3600),
        Any,
        "0",
        true,
        "Seconds to wait after its start before the next instance is started.",
    ),
    key(
        "boot.autostart.priority",
        Integer(0, 1_000_000),
        Any,
        "0",
        true,
        "When the host starts, instances of higher priority are started first.",
    ),
    key(CRASH_ACTION, OneOf(&["stop", "halt"]), VirtualMachine, "stop", false, CRASH),
    key(
        "boot.host_shutdown_action",
        OneOf(&["stop", "force-stop", "stateful-stop"]),
        Any,
        "stop",
        true,
        "How the instance stops when its host goes down: gracefully, by force, or with its memory kept (virtual machines with \
         migration.stateful). What cannot be done that way is done gracefully, and by force at last.",
    ),
    key(
        "boot.host_shutdown_timeout",
        Integer(0, 86400),
        Any,
        "30",
        true,
        "Seconds to wait for a graceful stop before forcing it, when the host goes down.",
    ),
    key(
        "boot.reboot_action",
        OneOf(&["restart", "stop"]),
        VirtualMachine,
        "restart",
        false,
        "What comes of a system that restarts its machine: it restarts, or the instance stops.",
    ),
    key(
        "boot.stop.priority",
        Integer(0, 1_000_000),
        Any,
        "0",
        true,
        "When the host goes down, instances of higher priority are stopped first.",
    ),
    key(
        "cloud-init.network-config",
        Text,
        Any,
        "DHCP on the first NIC",
        false,
        "cloud-init network configuration.",
    ),
    key("cloud-init.user-data", Text, Any, "", false, "cloud-init user data."),
    key("cloud-init.vendor-data", Text, Any, "", false, "cloud-init vendor data."),
    key("environment.*", Text, Any, "", true, "Environment of the container's init and of exec."),
    key(
        "hardware.balloon",
        Bool,
        VirtualMachine,
        "true",
        false,
        "The machine has a balloon, by which its memory shrinks and grows back while it runs.",
    ),
    key(
        "hardware.balloon.deflate",
        Bool,
        VirtualMachine,
        "false",
        false,
        "A guest that is short of memory takes back what the balloon has.",
    ),
    key(crate::board::PERIOD, Integer(0, 86_400), VirtualMachine, "10", false, of_board::PERIOD),
    key(
        "hardware.boot.retry",
        Integer(0, 65535),
        VirtualMachine,
        "never",
        false,
        "Milliseconds until a firmware that found nothing to boot begins anew.",
    ),
    key(
        "hardware.boot_menu",
        Bool,
        VirtualMachine,
        "false",
        false,
        "The firmware waits some seconds for a key that opens its menu of what to boot.",
    ),
    key(
        "hardware.boot_menu.timeout",
        Integer(0, 65535),
        VirtualMachine,
        "5000",
        false,
        "Milliseconds that the menu of the firmware waits (hardware.boot_menu).",
    ),
    key(
        "hardware.clock",
        OneOf(&["utc", "localtime"]),
        VirtualMachine,
        "localtime for Windows, else utc",
        false,
        "What the clock of the hardware shows.",
    ),
    key("hardware.clock.start", Text, VirtualMachine, "", false, of_board::CLOCK_START),
    key("hardware.clock.zone", Text, VirtualMachine, "", false, of_board::CLOCK_ZONE),
    key(
        "hardware.cpu.model",
        Text,
        VirtualMachine,
        "host with KVM, max without",
        false,
        "QEMU's CPU model, such as host, max or EPYC-v4; changes when the machine is stopped.",
    ),
    key(
        "hardware.cpu.topology",
        Text,
        VirtualMachine,
        "one socket",
        false,
        "How processors are laid out, such as sockets=2,dies=1,cores=4,threads=1; there is room for as many.",
    ),
    key("hardware.features", Text, VirtualMachine, "", false, of_board::FEATURES),
    key(
        "hardware.generation",
        Text,
        VirtualMachine,
        "",
        false,
        "A UUID that the guest is told as its generation: another one after it was copied or put back.",
    ),
    key(
        "hardware.hpet",
        Bool,
        VirtualMachine,
        "false",
        false,
        "The machine has a high precision event timer.",
    ),
    key("hardware.hyperv", Bool, VirtualMachine, "true for Windows", false, "Hyper-V's interfaces (KVM)."),
    key(
        "hardware.input",
        Text,
        VirtualMachine,
        "",
        false,
        "Input devices of virtio: keyboard, mouse, tablet.",
    ),
    key("hardware.iommu", Text, VirtualMachine, "", false, of_board::IOMMU),
    key("hardware.iothreads", Text, VirtualMachine, "none", true, text::IOTHREADS),
    key("hardware.iothreads.*", Text, VirtualMachine, "QEMU's", true, text::PROPERTIES),
    key(
        "hardware.machine",
        Text,
        VirtualMachine,
        "q35",
        false,
        "Machine type: q35 or pc for the newest of the host, or a version such as pc-q35-7.2. Fixed when the machine is made.",
    ),
    key("hardware.main_thread.pool", Text, VirtualMachine, "", false, of_board::MAIN_POOL),
    key(
        "hardware.memory",
        Text,
        VirtualMachine,
        "",
        false,
        "How memory is had of the host: file, disk (a file of the file system that its state is on), locked, shared, allocated (from the start), unmerged, hugepages or hugepages=2MiB.",
    ),
    key("hardware.memory.modules", Text, VirtualMachine, "", false, of_board::MODULES),
    key("hardware.memory.slots", Text, VirtualMachine, "", false, of_board::SLOTS),
    key(
        "hardware.numa",
        Text,
        VirtualMachine,
        "one node",
        false,
        "Nodes of memory, each with its processors: 0-1:512MiB;2-3:512MiB. Together they are limits.memory, or limits.memory.maximum.",
    ),
    key("hardware.numa.distances", Text, VirtualMachine, "", false, of_board::DISTANCES),
    key("hardware.numa.host", Text, VirtualMachine, "", false, of_board::HOST),
    key("hardware.numa.memory", Text, VirtualMachine, "", false, of_board::CELLS),
    key("hardware.numa.placement", Text, VirtualMachine, "", false, of_board::PLACEMENT),
    key("hardware.numa.policy", Text, VirtualMachine, "bind", false, of_board::POLICY),
    key(
        "hardware.panic",
        Bool,
        VirtualMachine,
        "false",
        false,
        "A guest whose kernel panics can say so (pvpanic).",
    ),
    key(
        "hardware.preset",
        OneOf(&["windows"]),
        VirtualMachine,
        "",
        false,
        "windows: what its installer has drivers for, where devices do not say otherwise (SATA, e1000e), and a TPM; clock in local time.",
    ),
    key("hardware.rng", Text, VirtualMachine, "plain", false, of_board::RNG),
    key("hardware.scsi", Text, VirtualMachine, "virtio-scsi", false, of_board::SCSI),
    key("hardware.scsi.iothread", Integer(1, 65_535), VirtualMachine, "the main one", false, text::SCSI),
    key(
        "hardware.sleep",
        OneOf(&["memory", "disk", "both"]),
        VirtualMachine,
        "",
        false,
        "States of sleep that the firmware offers.",
    ),
    key("hardware.smbios.*", Text, VirtualMachine, "Karst's", false, of_board::SMBIOS),
    key("hardware.sound", Text, VirtualMachine, "", false, of_board::SOUND),
    key("hardware.sound.codecs", Text, VirtualMachine, "", false, of_board::CODECS),
    key(
        "hardware.spice",
        Bool,
        VirtualMachine,
        "false",
        false,
        "The screen is there by SPICE too (incus console --type vga), with the clipboard, USB devices of the viewer's and an \
         exact pointer. It costs an idle machine processor time, and a machine starts without it where the host's QEMU has \
         no SPICE.",
    ),
    key(
        "hardware.usb",
        Text,
        VirtualMachine,
        "",
        false,
        "Controllers of USB: piix3-uhci, piix4-uhci, pci-ohci, ehci, ich9-ehci1 with ich9-uhci1:0 and its like, nec-xhci, qemu-xhci:PORTS.",
    ),
    key(
        "hardware.usb.devices",
        Text,
        VirtualMachine,
        "",
        false,
        "Emulated devices of USB: hub, keyboard, mouse, tablet, audio, each with its place as in hub@0:1.",
    ),
    key("hardware.usb.filter", Text, VirtualMachine, "", false, of_board::USB_FILTER),
    key("hardware.video", Text, VirtualMachine, "vga", false, of_board::VIDEO),
    key("hardware.video.render", Text, VirtualMachine, "", false, of_board::RENDER),
    key("hardware.virtio", Text, VirtualMachine, "", false, of_board::VIRTIO),
    key(
        "hardware.watchdog",
        Text,
        VirtualMachine,
        "",
        false,
        "A watchdog and what it does: i6300esb or ib700, with reset, shutdown, poweroff, pause, none or inject-nmi, as in i6300esb:reset.",
    ),
    key("image.*", Text, Any, "", true, "Property of the image the instance was made of."),
    key(
        "limits.cpu",
        Cpus,
        Any,
        "containers: all; virtual machines: 1",
        true,
        "Number of CPUs, or a set of host CPUs such as 0-1,3. A virtual machine with secure boot has another number from its next start on, an emulated one a smaller number, and any one more than its host has.",
    ),
    key(
        "limits.cpu.allowance",
        Allowance,
        Any,
        "100%",
        true,
        "Share under contention (50%) or hard limit (25ms/100ms; finer: 12500us/50ms).",
    ),
    key(maximum::CPUS, Integer(1, 4096), VirtualMachine, "limits.cpu", false, maximum::text::CPUS),
    key(
        "limits.cpu.nodes",
        Nodes,
        Any,
        "all",
        true,
        "NUMA nodes of the host on whose CPUs it runs, such as 0 or 0-1; limits.cpu is then a number of CPUs, or left out.",
    ),
    key("limits.cpu.pin.*", Text, VirtualMachine, "all of limits.cpu", true, text::PIN),
    key(
        "limits.cpu.priority",
        Integer(0, 10),
        Container,
        "10",
        true,
        "Priority when CPUs are contended; between containers of the same share.",
    ),
    key("limits.cpu.shares", Integer(2, 262_144), VirtualMachine, "1024", true, text::SHARES),
    key(
        "limits.disk.priority",
        Integer(0, 10),
        Any,
        "5",
        true,
        "Priority when disks are contended, where the host's scheduler of disks has one.",
    ),
    key("limits.hugepages.1GB", Size, Container, "no limit", true, HUGE_PAGES),
    key("limits.hugepages.1MB", Size, Container, "no limit", true, HUGE_PAGES),
    key("limits.hugepages.2MB", Size, Container, "no limit", true, HUGE_PAGES),
    key("limits.hugepages.64KB", Size, Container, "no limit", true, HUGE_PAGES),
    key(
        "limits.kernel.*",
        KernelLimit,
        Container,
        "the host's",
        false,
        "Resource limit of processes, such as nofile: a number, soft:hard, or unlimited.",
    ),
    key(
        "limits.memory",
        Memory,
        Any,
        "containers: all; virtual machines: 1GiB",
        true,
        "Memory: a size, or a share of the host's, which is what it is at the start and at each change.",
    ),
    key(
        "limits.memory.enforce",
        OneOf(&["hard", "soft"]),
        Container,
        "hard",
        true,
        "A hard limit holds always, a soft one when the host is short of memory.",
    ),
    key("limits.memory.hard", Size, VirtualMachine, "no limit", true, text::HARD),
    key(maximum::MEMORY, Size, VirtualMachine, "limits.memory", false, maximum::text::MEMORY),
    key("limits.memory.nodes", Nodes, VirtualMachine, "all", true, text::NODES),
    key(
        "limits.memory.oom_priority",
        Integer(0, 1000),
        Container,
        "0",
        false,
        "The higher, the earlier the container's processes are killed when the host is out of memory.",
    ),
    key("limits.memory.soft", Size, VirtualMachine, "no limit", true, text::SOFT),
    key(
        "limits.memory.swap",
        Swap,
        Any,
        "true",
        true,
        "May memory be swapped out: true, false, or at most so much.",
    ),
    key(
        "limits.memory.swap.priority",
        Integer(0, 10),
        Container,
        "10",
        true,
        "The higher, the less is swapped out (control groups v1 only).",
    ),
    key("limits.processes", Integer(1, i32::MAX as i64), Container, "no limit", true, "Number of processes."),
    key(
        "linux.kernel_modules",
        Text,
        Container,
        "",
        false,
        "Modules that the host's kernel must have loaded, comma-separated. They are checked and not loaded.",
    ),
    key(
        "linux.sysctl.*",
        Text,
        Container,
        "the kernel's",
        false,
        "Setting of the kernel for the container alone, such as linux.sysctl.net.ipv4.ip_forward.",
    ),
    key(
        "migration.stateful",
        Bool,
        VirtualMachine,
        "false",
        false,
        "The memory can be kept over a stop and in snapshots; devices that forbid it are left out.",
    ),
    key(
        "oci.cwd",
        Text,
        Container,
        "the image's",
        false,
        "Working directory of an application container's program.",
    ),
    key(
        "oci.entrypoint",
        Text,
        Container,
        "the image's",
        false,
        "Program and arguments of an application container; words in quotes as a shell has them.",
    ),
    key("oci.gid", Integer(0, 65_535), Container, "the image's", false, "Group that it runs as."),
    key("oci.uid", Integer(0, 65_535), Container, "the image's", false, "User that it runs as."),
    key(
        "raw.lxc",
        Text,
        Container,
        "",
        false,
        "Lines added to the configuration that liblxc gets, where the host grants it: raw_keys in host-policy.toml.",
    ),
    key(
        "screen.keymap",
        OneOf(screens::KEYMAPS),
        VirtualMachine,
        "keys as they are",
        false,
        screens::text::KEYMAP,
    ),
    key("screen.spice.listen", Text, VirtualMachine, "nowhere", true, screens::text::SPICE),
    key("screen.vnc.listen", Text, VirtualMachine, "nowhere", true, screens::text::VNC),
    key("screen.vnc.power_control", Bool, VirtualMachine, "false", false, screens::text::POWER),
    key(
        "screen.vnc.share",
        OneOf(screens::SHARES),
        VirtualMachine,
        "allow-exclusive",
        false,
        screens::text::SHARE,
    ),
    key("screen.vnc.websocket", Text, VirtualMachine, "none", true, screens::text::WEBSOCKET),
    key(
        "security.csm",
        Bool,
        VirtualMachine,
        "false",
        false,
        "Legacy firmware (SeaBIOS) rather than UEFI. Changes when the machine is stopped.",
    ),
    key(
        "security.guestapi",
        Bool,
        Container,
        "true",
        false,
        "Serve the guest's own data inside it, at /dev/incus/sock and /dev/lxd/sock.",
    ),
    key(
        "security.guestapi.images",
        OneOf(&["false"]),
        Container,
        "false",
        false,
        "Hand out images by the guest API; not there.",
    ),
    key(
        "security.idmap.base",
        Integer(0x7000_0000, 0x7ffe_0000),
        Container,
        "chosen by the host",
        false,
        "First host id of the container's range: a multiple of 65536 within Karst's area that nobody else has.",
    ),
    key(
        "security.idmap.isolated",
        OneOf(&["true"]),
        Container,
        "true",
        false,
        "Every container has a range of ids of its own.",
    ),
    key(
        "security.idmap.size",
        Integer(65_536, 65_536 * 1024),
        Container,
        "65536",
        false,
        "How many ids the container has: a multiple of 65536. More are needed by containers with id maps inside it.",
    ),
    key("security.nesting", Bool, Container, "false", false, "Allow containers inside the container."),
    key(
        "security.privileged",
        Bool,
        Container,
        "false",
        false,
        "Root of the container is the host's root, where the host grants it: privileged_containers in host-policy.toml. It then \
         is as good as root of the host; a path of the host alone is shared with its owners by shift=true of the disk.",
    ),
    key("security.protection.delete", Bool, Any, "false", true, "Refuse to delete the instance."),
    key(
        "security.protection.shift",
        Bool,
        Container,
        "false",
        true,
        "Keep the owners of files on disk as they are, which they always are here: mounts are mapped.",
    ),
    key("security.protection.start", Bool, Any, "false", true, "Refuse to start the instance."),
    key(
        "security.secureboot",
        Bool,
        VirtualMachine,
        "true, false with security.csm or hardware.machine pc",
        false,
        "The UEFI firmware starts only what is signed by the enrolled keys (Microsoft's). Changes when the machine is stopped.",
    ),
    key(
        "security.syscalls.deny",
        Text,
        Container,
        "",
        false,
        "System calls that are refused besides, one a line: NAME errno NUMBER, or NAME alone, which kills who calls it.",
    ),
    key(
        "security.syscalls.deny_compat",
        OneOf(&["false"]),
        Container,
        "false",
        false,
        "Refuse calls of 32-bit programs; not there.",
    ),
    key(
        "security.syscalls.deny_default",
        OneOf(&["true"]),
        Container,
        "true",
        false,
        "Refuse the calls that no container needs, which is always so here.",
    ),
    key("smbios11.*", Text, VirtualMachine, "", false, keys_machine::SMBIOS),
    key("snapshots.expiry", Span, Any, "never", true, "When snapshots of the instance go, such as 2w 3d."),
    key(
        "snapshots.expiry.manual",
        Span,
        Any,
        "snapshots.expiry",
        true,
        "When snapshots go that were not taken by the schedule.",
    ),
    key(
        "snapshots.keep",
        Integer(1, schedule::MOST_KEPT as i64),
        Any,
        "all",
        true,
        "How many snapshots of the schedule are kept: when it has taken one, its oldest beyond them go. What was taken by \
         hand, renamed or given another end is neither counted nor deleted.",
    ),
    key(
        "snapshots.pattern",
        Pattern,
        Any,
        "snap%d",
        true,
        "Names of snapshots: %d is the next number, {{ creation_date }} the time.",
    ),
    key(
        "snapshots.quiesce",
        OneOf(crate::snapshot::Quiesce::WORDS),
        VirtualMachine,
        "no",
        true,
        "Make the file systems inside still, by the guest's agent, before a snapshot, copy or backup of the running machine is \
         taken: no, try (a warning where the agent cannot), require (nothing is taken without). Not with its memory.",
    ),
    key(
        "snapshots.schedule",
        Schedule,
        Any,
        "",
        true,
        "When snapshots are taken (UTC): a line of cron, or @hourly, @daily, @weekly, @monthly, @annually, @startup.",
    ),
    key(
        "snapshots.schedule.stopped",
        Bool,
        Any,
        "false",
        true,
        "Take scheduled snapshots of the stopped instance too.",
    ),
    key("systemd.credential-binary.*", Text, VirtualMachine, "", false, keys_machine::CREDENTIAL_BINARY),
    key("systemd.credential.*", Text, VirtualMachine, "", false, keys_machine::CREDENTIAL),
    key("user.*", Text, Any, "", true, "Free for the user."),
    key("volatile.*", Text, Any, "", true, "Kept by the platform."),
];

impl Key {
    /// Does the row cover `name`?
    pub fn matches(&self, name: &str) -> bool {
        match self.name.strip_suffix('*') {
            Some(prefix) => name.len() > prefix.len() && name.starts_with(prefix),
            None => self.name == name,
        }
    }

    fn check(&self, field: &str, value: &str) -> Result<()> {
        match self.kind {
            Text => Ok(()),
            Bool => parse_bool(field, value).map(drop),
            Size => ByteSize::parse(field, value).map(drop),
            Memory => parse_memory(field, value).map(drop),
            Cpus => parse_cpus(field, value).map(drop),
            Nodes => parse_nodes(field, value).map(drop),
            Allowance => parse_allowance(field, value).map(drop),
            Swap => parse_swap(field, value).map(drop),
            KernelLimit => parse_kernel_limit(field, value).map(drop),
            Schedule => schedule::Schedule::parse(field, value).map(drop),
            Span => schedule::Span::parse(field, value).map(drop),
            Pattern => schedule::check_pattern(field, value),
            Integer(low, high) => match value.parse::<i64>() {
                Ok(n) if (low..=high).contains(&n) => Ok(()),
                _ => Err(Error::invalid(
                    field,
                    format!("{value:?} is not a whole number from {low} to {high}"),
                )),
            },
            OneOf(words) if words.contains(&value) => Ok(()),
            OneOf(words) => Err(Error::invalid(
                field,
                format!("{value:?} is not possible here; use {}", words.join(" or ")),
            )),
        }
    }
}

/// Row of the table for `name`.
pub fn lookup(name: &str) -> Option<&'static Key> {
    INSTANCE_KEYS.iter().find(|k| k.matches(name))
}

/// Checks a configuration as users write it: known keys, fitting kind, well-formed values. Empty values mean "not set".
/// `kind` is `None` for profiles, which serve both.
pub fn check(config: &Config, kind: Option<InstanceKind>) -> Result<()> {
    for (name, value) in config {
        check_free(name, value)?;
        let field = format!("config.{name}");
        let Some(row) = lookup(name) else {
            if let Some(why) = keys_container::missing(name) {
                return Err(Error::unsupported(format!("{name:?} is not there; {why}")).at(field));
            }
            let hint = match nearest(name, INSTANCE_KEYS.iter().map(|k| k.name)) {
                Some(n) => format!("; did you mean {n:?}?"),
                None => "; `karst config keys` lists the known ones, user.* is free".to_owned(),
            };
            return Err(Error::invalid(field, format!("unknown configuration key {name:?}{hint}")));
        };
        match (row.scope, kind) {
            (Container, Some(InstanceKind::VirtualMachine))
            | (VirtualMachine, Some(InstanceKind::Container)) => {
                return Err(Error::invalid(
                    field,
                    format!("{name:?} does not apply to a {}", kind.map_or("", |k| k.as_str())),
                ));
            }
            _ => {}
        }
        if let Some(resource) = name.strip_prefix("limits.kernel.")
            && !KERNEL_LIMITS.contains(&resource)
        {
            let known = KERNEL_LIMITS.join(", ");
            return Err(Error::invalid(
                field,
                format!("{resource:?} is no resource of the kernel; known are {known}"),
            ));
        }
        if name.starts_with("environment.") && name.contains('=') {
            return Err(Error::invalid(field, "the name of a variable cannot contain '='"));
        }
        // Said here, and not by the next start.
        if name.starts_with("environment.") && format!("{name}{value}").contains(['\n', '\r', '\0']) {
            return Err(Error::invalid(field, "a variable cannot contain line breaks"));
        }
        if !value.is_empty() {
            row.check(&field, value)?;
            keys_container::check(name, &field, value)?;
            threads::check(name, &field, value)?;
            screens::check(name, &field, value)?;
        }
    }
    keys_machine::strings(config).map(drop)
}

/// Checks what holds for every key and value, also those that are free (`user.*`).
pub fn check_free(name: &str, value: &str) -> Result<()> {
    let field = || format!("config.{name}");
    if name.len() > 255 || name.chars().any(char::is_control) {
        return Err(Error::invalid(
            "config",
            format!(
                "{:?} is no key: at most 255 bytes without control characters",
                name.chars().take(64).collect::<String>()
            ),
        ));
    }
    if value.len() > 1 << 20 {
        return Err(Error::invalid(field(), format!("the value of {name:?} is larger than 1 MiB")));
    }
    if value.contains('\0') {
        return Err(Error::invalid(field(), format!("the value of {name:?} contains a NUL byte")));
    }
    Ok(())
}

pub(crate) fn set<'a>(config: &'a Config, name: &str) -> Option<&'a str> {
    config.get(name).map(String::as_str).filter(|v| !v.is_empty())
}

/// Limits out of an expanded configuration.
pub fn limits(config: &Config) -> Result<Limits> {
    let memory = set(config, "limits.memory").map(|v| parse_memory("config.limits.memory", v)).transpose()?;
    let nodes = "config.limits.cpu.nodes";
    let cpu_nodes = set(config, "limits.cpu.nodes").map(|v| parse_nodes(nodes, v)).transpose()?;
    if cpu_nodes.is_some() && set(config, "limits.cpu").is_some_and(|v| v.parse::<u32>().is_err()) {
        return Err(Error::invalid(
            nodes,
            "limits.cpu names the CPUs already; make it a number of CPUs, or take one of the two away",
        ));
    }
    let cpu = set(config, "limits.cpu").map(|v| parse_cpus("config.limits.cpu", v)).transpose()?;
    let (cpu_maximum, memory_maximum) = maximum::of(config, cpu.as_ref(), memory)?;
    let (memory_hard, memory_high) = threads::memory_limits(config, memory)?;
    let (memory, memory_share) = match memory {
        Some(MemoryLimit::Size { size }) => {
            demand_memory("config.limits.memory", size)?;
            (Some(size), None)
        }
        Some(MemoryLimit::Share { percent }) => (None, Some(percent)),
        None => (None, None),
    };
    Ok(Limits {
        cpu_nodes,
        cpu_maximum,
        memory_maximum,
        pins: threads::pins(config, cpu.as_ref())?,
        cpu_shares: set(config, "limits.cpu.shares").and_then(|v| v.parse().ok()),
        memory_hard,
        memory_high,
        memory_nodes: set(config, "limits.memory.nodes")
            .map(|v| parse_nodes("config.limits.memory.nodes", v))
            .transpose()?,
        hugepages: config
            .iter()
            .filter(|(_, v)| !v.is_empty())
            .filter_map(|(k, v)| Some((k.strip_prefix("limits.hugepages.")?, k, v)))
            .map(|(size, k, v)| Ok((size.to_owned(), ByteSize::parse(&format!("config.{k}"), v)?)))
            .collect::<Result<_>>()?,
        cpu,
        cpu_allowance: set(config, "limits.cpu.allowance")
            .map(|v| parse_allowance("config.limits.cpu.allowance", v))
            .transpose()?,
        memory,
        memory_share,
        processes: set(config, "limits.processes").and_then(|v| v.parse().ok()),
        cpu_priority: set(config, "limits.cpu.priority").and_then(|v| v.parse().ok()),
        memory_soft: set(config, "limits.memory.enforce") == Some("soft"),
        swap: set(config, "limits.memory.swap")
            .map(|v| parse_swap("config.limits.memory.swap", v))
            .transpose()?,
        swap_priority: set(config, "limits.memory.swap.priority").and_then(|v| v.parse().ok()),
        disk_priority: set(config, "limits.disk.priority").and_then(|v| v.parse().ok()),
        oom_priority: set(config, "limits.memory.oom_priority").and_then(|v| v.parse().ok()),
        kernel: config
            .iter()
            .filter(|(_, v)| !v.is_empty())
            .filter_map(|(k, v)| Some((k.strip_prefix("limits.kernel.")?, k, v)))
            .map(|(name, k, v)| Ok((name.to_owned(), parse_kernel_limit(&format!("config.{k}"), v)?)))
            .collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests;
