//! What a simulated host keeps.

use super::{
    checkpoints::BackingUp,
    copies::Copying,
    session::Session,
    storage::{Held, Snapshot},
};
use crate::{calls::ImagePart, outputs::ExecOutput};
use karst_model::{
    BackupId, ByteSize, CheckpointId, Error, ImageId, InstanceId, NetworkId, PoolId, Result, SessionId,
    SnapshotId, VolumeId,
    display::DisplayGuard,
    guest::{
        AgentKind, Details, DiskCounters, FileKind, FilesystemFigures, GuestSystem, Interface, Metrics,
        Observed, ProcessorTimes,
    },
    history::{Meter, Series},
    image::ImageFacts,
    instance::{ExitReason, HaltReason, InstanceKind, RuntimeState},
    spec::{CpuLimit, GuestSpec, NetworkSpec, PoolSpec, VolumeSpec},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

#[derive(Default)]
pub(super) struct State {
    pub pools: BTreeMap<PoolId, PoolSpec>,
    /// Those of them that it has let go of.
    pub closed: BTreeSet<PoolId>,
    pub networks: BTreeMap<NetworkId, Network>,
    /// Networks that were stopped, where guests that ran may be on still.
    pub stopped_networks: BTreeSet<NetworkId>,
    /// ACLs whose logs were forgotten.
    pub acl_logs_removed: BTreeSet<karst_model::AclId>,
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub described: super::descriptions::Described,
    pub images: BTreeMap<ImageId, Image>,
    pub staged: BTreeMap<(ImageId, ImagePart), File>,
    /// Files of backups.
    pub backups: BTreeMap<BackupId, Vec<u8>>,
    pub staged_backups: BTreeMap<BackupId, File>,
    pub guests: BTreeMap<InstanceId, Guest>,
    /// What is kept of virtual machines with snapshots, and whether with their memory.
    pub machine_states: BTreeMap<(InstanceId, SnapshotId), bool>,
    /// Machines that are something beside their disks and were not started yet.
    pub arrived: BTreeSet<InstanceId>,
    /// Disks that are copied, by their machine and the volume that the copy is.
    pub copies: BTreeMap<(InstanceId, VolumeId), Copying>,
    /// Copies that machines went on from since they were started.
    pub pivoted: BTreeSet<(InstanceId, VolumeId)>,
    /// Backups of disks of machines.
    pub backing_up: BTreeMap<InstanceId, BackingUp>,
    /// Checkpoints that volumes have.
    pub marks: BTreeSet<(VolumeId, CheckpointId)>,
    /// Memory of machines in files.
    pub memories: super::memory::Memories,
    pub sessions: BTreeMap<SessionId, Session>,
    /// What programs printed.
    pub outputs: BTreeMap<ExecOutput, Vec<u8>>,
    /// Starts of machines in which a command of the monitor was run, and who follows its events.
    pub monitored: BTreeMap<InstanceId, u32>,
    pub followers: Vec<File>,
    /// Measurements of how fast memory is written, by start.
    pub dirty_rates: BTreeMap<InstanceId, (u32, u32, karst_model::guest::DirtyRateMode)>,
    /// How often machines are to tell of their memory, where that was said.
    pub memory_periods: BTreeMap<InstanceId, u32>,
    /// Passphrases that were handed over for calls to come.
    pub keys: BTreeMap<crate::keys::KeyOwner, karst_model::encryption::Passphrases>,
    /// Addresses that were seen behind MAC addresses, beside those that DHCP gave.
    pub spoke: Vec<(String, IpAddr)>,
    /// Thresholds of disks, by machine and slot: of which start, and the byte.
    pub thresholds: BTreeMap<(InstanceId, String), (u32, u64)>,
    /// USB devices that were plugged after the start.
    pub plugged: Vec<crate::resources::UsbResources>,
    /// What guests used over time.
    pub histories: BTreeMap<InstanceId, (Meter, Vec<Series>)>,
    pub next_pid: u32,
    /// The audit log and its end.
    pub audit: (Vec<karst_model::audit::AuditRecord>, karst_model::audit::AuditHead),
}

pub(super) struct Network {
    pub spec: NetworkSpec,
    /// Addresses by MAC, kept as long as the network is.
    pub leases: BTreeMap<String, Ipv4Addr>,
}

pub(super) struct Volume {
    pub spec: VolumeSpec,
    pub size: Option<ByteSize>,
    pub held: Held,
    /// It shares nothing with what it was made of.
    pub full: bool,
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// The files of a disk in layers, lowest first.
    pub chain: Vec<u32>,
    /// What the lowest was made of lies below it.
    pub based: bool,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SimulatedFile {
    pub kind: FileKind,
    pub data: Arc<Vec<u8>>,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub modified: i64,
    pub target: Option<String>,
}

pub(super) struct Image {
    pub facts: ImageFacts,
    pub parts: Vec<(ImagePart, File, u64)>,
    /// What a volume made of it holds.
    pub held: super::storage::Held,
}

pub(super) struct Guest {
    /// Its runner's log was emptied.
    pub runner_cleared: bool,
    pub spec: GuestSpec,
    pub state: RuntimeState,
    pub pid: u32,
    /// Monotonic time of the start, and of the last change.
    pub started: Duration,
    /// Seconds since the epoch.
    pub started_at: i64,
    pub stops_at: Option<Duration>,
    pub exit: Option<ExitReason>,
    /// Why it stands still though nobody asked for that.
    pub halt: Option<HaltReason>,
    pub applied_spec_version: u64,
    pub ignores_shutdown: bool,
    pub refuses_update: bool,
    /// Its memory is kept.
    pub saved: bool,
    /// Its file systems are still.
    pub still: bool,
    /// What viewers of its display were last said to have to know.
    pub display_guard: Option<DisplayGuard>,
    pub console_extra: Vec<u8>,
    pub console_cleared: bool,
}

impl State {
    /// Is the machine something beside its disks, now or at a snapshot?
    pub fn has_machine_state(&self, instance: InstanceId, at: Option<SnapshotId>) -> bool {
        match at {
            None => self.guests.contains_key(&instance) || self.arrived.contains(&instance),
            Some(snapshot) => self.machine_states.contains_key(&(instance, snapshot)),
        }
    }

    /// Makes it so, or not.
    pub fn set_machine_state(
        &mut self,
        instance: InstanceId,
        at: Option<SnapshotId>,
        there: bool,
    ) -> Result<()> {
        if at.is_none() && self.guests.get(&instance).is_some_and(Guest::runs) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        if there && !self.guests.contains_key(&instance) {
            self.arrived.insert(instance);
        }
        match at {
            Some(snapshot) if there => drop(self.machine_states.insert((instance, snapshot), false)),
            Some(snapshot) => drop(self.machine_states.remove(&(instance, snapshot))),
            None => {
                if let Some(guest) = self.guests.get_mut(&instance) {
                    guest.saved = false;
                }
            }
        }
        Ok(())
    }
}

impl Network {
    /// The guest's address, chosen when it is first asked for.
    pub fn lease(&mut self, mac: &str, fixed: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let net = self.spec.spec.ipv4?;
        let configured = self.spec.hosts.iter().find(|h| h.mac == mac).and_then(|h| h.ipv4);
        if let Some(address) = fixed.or(configured) {
            self.leases.insert(mac.to_owned(), address);
        }
        if let Some(address) = self.leases.get(mac) {
            return Some(*address);
        }
        if !self.spec.spec.dhcp {
            return None;
        }
        let (first, last) = self.spec.spec.dhcp_ranges.first().copied().unwrap_or_else(|| {
            let (first, last) = (u32::from(net.network()) + 2, u32::from(net.broadcast()) - 1);
            (first.into(), last.into())
        });
        let reserved: Vec<Ipv4Addr> = self.spec.hosts.iter().filter_map(|h| h.ipv4).collect();
        let address = (u32::from(first)..=u32::from(last))
            .map(Ipv4Addr::from)
            .find(|a| *a != net.addr() && !reserved.contains(a) && !self.leases.values().any(|l| l == a))?;
        self.leases.insert(mac.to_owned(), address);
        Some(address)
    }
}

impl Guest {
    pub fn runs(&self) -> bool {
        !self.state.is_down()
    }

    pub fn ended(&mut self, _now: Duration, why: ExitReason) {
        self.state = RuntimeState::Stopped;
        self.exit = Some(why);
        self.halt = None;
        self.stops_at = None;
    }

    pub fn observed(&self) -> Observed {
        let runs = self.runs();
        Observed {
            instance: self.spec.instance,
            generation: self.spec.generation,
            state: self.state,
            pid: runs.then_some(self.pid),
            domain_id: runs.then_some(self.spec.domain_id),
            started_at: runs.then_some(self.started_at),
            exit: self.exit.clone(),
            halt: self.halt.clone(),
            applied_spec_version: self.applied_spec_version,
            accelerator: (self.spec.kind == InstanceKind::VirtualMachine).then(|| "kvm".to_owned()),
        }
    }

    pub fn console(&self) -> Vec<u8> {
        let mut log = Vec::new();
        if !self.console_cleared {
            let name = &self.spec.hostname;
            log.extend_from_slice(
                format!("systemd[1]: Detected simulation.\r\n\r\nDebian GNU/Linux 12 {name} console\r\n\r\n{name} login: ")
                    .as_bytes(),
            );
        }
        log.extend_from_slice(&self.console_extra);
        log
    }
}

impl State {
    pub fn take_sessions_of(&mut self, instance: InstanceId) -> Vec<Session> {
        let ids: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.instance == instance && s.ends_with_guest && s.exit().is_none())
            .map(|(id, _)| *id)
            .collect();
        // They stay in the table so that waiters learn how they ended.
        ids.iter().filter_map(|id| self.sessions.get(id).cloned()).collect()
    }

    /// The guest that has this volume and runs.
    pub fn user_of(&self, volume: VolumeId) -> Option<InstanceId> {
        let has = |g: &&Guest| {
            let mut disks = g.spec.disks.iter().filter_map(|d| d.volume());
            let disk = g.spec.root.volume == volume || disks.any(|(_, v)| v == volume);
            let target = || self.is_copied_to(g, volume) || self.is_backed_up_to(g.spec.instance, volume);
            g.runs() && (disk || target())
        };
        self.guests.values().find(has).map(|g| g.spec.instance)
    }

    pub fn metrics(
        &mut self,
        instance: InstanceId,
        now: Duration,
        address_after: Duration,
    ) -> Option<Metrics> {
        let guest = self.guests.get(&instance).filter(|g| g.runs())?;
        let up = now.saturating_sub(guest.started);
        let cpus = match &guest.spec.limits.cpu {
            Some(CpuLimit::Count { n }) => u64::from(*n),
            Some(CpuLimit::Set { cpus }) => cpus.len() as u64,
            None => 1,
        };
        let total = guest.spec.limits.memory.unwrap_or(ByteSize::gib(1)).bytes();
        let memory = (total / 8 + up.as_secs() * 4096).min(total);
        let mut interfaces = BTreeMap::new();
        interfaces.insert(
            "lo".to_owned(),
            Interface {
                mtu: 65536,
                up: true,
                loopback: true,
                addresses: vec![(Ipv4Addr::LOCALHOST.into(), 8, "local".into())],
                ..Interface::default()
            },
        );
        for nic in &guest.spec.nics {
            let mut addresses = vec![];
            if up >= address_after
                && let Some(network) = nic.network().and_then(|id| self.networks.get_mut(&id))
                && let Some(address) = network.lease(&nic.mac, nic.ipv4)
            {
                let prefix = network.spec.spec.ipv4.map_or(32, |n| n.prefix_len());
                addresses.push((IpAddr::from(address), prefix, "global".to_owned()));
            }
            let seconds = up.as_secs();
            interfaces.insert(
                nic.guest_name.clone(),
                Interface {
                    mac: nic.mac.clone(),
                    host_name: nic.host_interface.clone(),
                    mtu: nic.mtu.unwrap_or(1500),
                    up: true,
                    loopback: false,
                    addresses,
                    counters: [1000 + seconds * 500, 800 + seconds * 300, 10 + seconds, 8 + seconds],
                    losses: [0, 0, 1, 2],
                },
            );
        }
        Some(Metrics {
            cpu_ns: Some(50_000_000 + up.as_nanos() as u64 / 20 * cpus),
            memory: Some(memory),
            memory_peak: Some(memory),
            swap: Some(0),
            memory_total: Some(total),
            processes: Some(12),
            disk_read: Some(1 << 20),
            disk_written: Some(4096 * (1 + up.as_secs())),
            interfaces,
            sampled_at: None,
            details: None,
            system: (guest.spec.kind == InstanceKind::VirtualMachine).then(|| GuestSystem {
                agent: AgentKind::Karst,
                os: "Simulated".into(),
                os_version: "1".into(),
                kernel: "6.1.0".into(),
                hostname: guest.spec.hostname.clone(),
                fqdn: guest.spec.hostname.clone(),
            }),
        })
    }

    /// What monitoring reads beside.
    pub fn details(metrics: &Metrics) -> Details {
        let used = metrics.memory.unwrap_or(0);
        let total = metrics.memory_total.unwrap_or(0);
        let parts = [
            ("Active", used / 2),
            ("Active_anon", used / 4),
            ("Active_file", used / 4),
            ("Cached", used / 4),
            ("Dirty", 4096),
            ("Inactive", used / 2),
            ("Inactive_anon", used / 4),
            ("Inactive_file", used / 4),
            ("Mapped", used / 8),
            ("MemAvailable", total - used),
            ("MemFree", total - used),
            ("RSS", used / 2),
            ("Shmem", 0),
            ("Unevictable", 0),
            ("Writeback", 0),
        ];
        let time = metrics.cpu_ns.unwrap_or(0);
        let disk = DiskCounters {
            read_bytes: metrics.disk_read.unwrap_or(0),
            reads: Some(16),
            written_bytes: metrics.disk_written.unwrap_or(0),
            writes: Some(8),
        };
        Details {
            processors: vec![ProcessorTimes {
                number: 0,
                modes: [("system".into(), time / 4), ("user".into(), time - time / 4)].into(),
            }],
            memory: parts.map(|(name, bytes)| (name.to_owned(), bytes)).into(),
            oom_kills: Some(0),
            disks: [("sda".to_owned(), disk)].into(),
            filesystems: vec![FilesystemFigures {
                device: "/dev/sda1".into(),
                kind: "ext4".into(),
                mount_point: "/".into(),
                size: 10 << 30,
                free: 6 << 30,
                available: 5 << 30,
            }],
            nics: BTreeMap::new(),
        }
    }
}
