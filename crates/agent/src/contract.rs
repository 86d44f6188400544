//! The contract suite of [`HostAgent`]: what the engine relies on, whoever answers. It runs over the simulation, over the
//! simulation behind the wire, and over the real agent.
//!
//! Each part makes what it needs with fresh ids, asserts, and removes it. It panics with the part's name at the first
//! breach, so it stands in a `#[test]`.

mod backups;
mod checkpoints;
mod copies;
mod descriptions;
mod guests;
mod keys;
mod layers;
mod memory;
mod parts;
mod publish;
mod storage;
mod threads;

use crate::{
    acl_logs::*, asks::*, backups::*, calls::*, copies::*, displays::*, keys::*, memory::*, outputs::*,
    publish::*, thresholds::*,
};
use karst_env::{EnvExt, SharedEnv};
use karst_model::{
    ByteSize, DeviceId, Error, ErrorKind, ImageId, InstanceId, NetworkId, NodeId, PoolId, Result, SagaId,
    VolumeId,
    device::{PortDevice, PortEnd, PortPlace},
    image::ImageFacts,
    instance::{Firmware, Generation, InstanceKind},
    network::BridgeSpec,
    spec::*,
    storage::{PoolKind, VolumeContent},
};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Where the suite's image comes from.
#[derive(Debug, Clone)]
pub enum ImageSource {
    /// These parts are uploaded.
    Upload(Vec<(ImagePart, Vec<u8>)>),
    /// These files are uploaded.
    Files(Vec<(ImagePart, std::path::PathBuf)>),
}

/// The agent under test and what it can do.
pub struct Subject {
    /// The agent.
    pub agent: Arc<dyn HostAgent>,
    /// Clock and randomness; sleeping must take no longer than it says.
    pub env: SharedEnv,
    /// Short id of the daemon, which interfaces carry.
    pub daemon_id: String,
    /// Epoch of the suite; the last part uses higher ones.
    pub epoch: AtomicU64,
    /// An image per kind of guest that the host can run; a kind without one is skipped visibly.
    pub container: Option<ImageSource>,
    /// See `container`.
    pub machine: Option<ImageSource>,
    /// Interface name for the suite's bridge, free on the host.
    pub bridge: String,
    /// Its address.
    pub ipv4: ipnet::Ipv4Net,
    /// A bridge of somebody else, if there is one: it must never be touched.
    pub foreign_bridge: Option<String>,
    /// Longest time from a start to the guest's address and a working exec.
    pub boot: Duration,
    /// A directory below which the host grants files for memory of machines; skipped visibly without.
    pub saves: Option<String>,
    /// Counter for interface names.
    pub counter: AtomicU32,
}

const CALL: Duration = Duration::from_secs(120);

impl Subject {
    /// A subject over a simulation.
    pub fn simulated(agent: Arc<dyn HostAgent>, env: SharedEnv) -> Self {
        Self {
            agent,
            env,
            daemon_id: "5a5a5a".into(),
            epoch: AtomicU64::new(10),
            container: Some(ImageSource::Upload(vec![(
                ImagePart::Unified,
                b"an image of a container".to_vec(),
            )])),
            machine: Some(ImageSource::Upload(vec![
                (ImagePart::Metadata, b"metadata".to_vec()),
                (ImagePart::Disk, b"disk".to_vec()),
            ])),
            bridge: "karstct0".into(),
            ipv4: "10.99.7.1/24".parse().unwrap(),
            foreign_bridge: Some("docker0".into()),
            boot: Duration::from_secs(60),
            saves: Some("/srv/saves".into()),
            counter: AtomicU32::new(0),
        }
    }

    /// Runs all parts.
    pub async fn run(&self) {
        macro_rules! parts { ($($module:ident::$name:ident),+ $(,)?) => { $(
            eprintln!("contract: {}", stringify!($name));
            // In boxes: unoptimized, the parts together are larger than a thread's stack.
            Box::pin($module::$name(self)).await;
        )+ } }
        parts!(
            parts::facts,
            parts::fences,
            parts::audit,
            parts::pools,
            parts::images,
            parts::volumes,
            storage::trees,
            storage::disks,
            storage::bytes,
            keys::encrypted_volumes,
            backups::trees,
            backups::disks,
            descriptions::of_pools_and_volumes,
            publish::images_of_trees,
            publish::images_of_disks,
            parts::networks,
            parts::interfaces,
            parts::unknown_things,
            parts::deadlines_and_cancel,
        );
        for (kind, image) in
            [(InstanceKind::Container, &self.container), (InstanceKind::VirtualMachine, &self.machine)]
        {
            match image {
                Some(image) => Box::pin(guests::all(self, kind, image)).await,
                None => eprintln!("contract: {kind}: skipped: this host cannot run one"),
            }
        }
        Box::pin(parts::epochs(self)).await;
        let check = self.agent.self_check(&self.read(), ()).await.unwrap();
        assert!(check.leaks.is_empty(), "left over: {check:?}");
        assert_eq!(check.sessions, 0, "{check:?}");
    }

    fn read(&self) -> CallContext {
        CallContext::read(CALL)
    }

    fn change(&self) -> CallContext {
        let fence = Fence {
            saga: SagaId(self.env.uuid()),
            executor: NodeId(uuid::Uuid::nil()),
            epoch: self.epoch.load(Ordering::SeqCst),
            step: 1,
        };
        CallContext::mutate(CALL, fence)
    }

    fn interface(&self) -> String {
        crate::names::host_interface(
            &self.daemon_id,
            0xc000_0000 + self.counter.fetch_add(1, Ordering::SeqCst),
        )
    }

    async fn pool(&self) -> PoolId {
        let id = PoolId(self.env.uuid());
        let spec = PoolSpec::own(id, PoolKind::Dir);
        self.agent.pool_ensure(&self.change(), spec).await.unwrap();
        id
    }

    async fn image(&self, source: &ImageSource) -> (ImageId, ImageFacts) {
        let id = ImageId(self.env.uuid());
        let parts = match source {
            ImageSource::Upload(parts) => parts.clone(),
            ImageSource::Files(files) => {
                files.iter().map(|(part, path)| (*part, std::fs::read(path).unwrap())).collect()
            }
        };
        for (part, data) in &parts {
            let staged =
                self.agent.image_stage(&self.change(), ImageStage { image: id, part: *part }).await.unwrap();
            assert_eq!(staged.fds.len(), 1);
            write_all(one(staged.fds), data.clone()).await;
        }
        let parts = parts.iter().map(|(part, _)| *part).collect();
        let facts = self
            .agent
            .image_import(&self.change(), ImageImport { image: id, parts, disk: None })
            .await
            .unwrap();
        (id, facts)
    }

    fn volume(&self, pool: PoolId, kind: InstanceKind, image: Option<ImageId>) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(self.env.uuid()),
            pool,
            content: match kind {
                InstanceKind::Container => VolumeContent::Filesystem,
                InstanceKind::VirtualMachine => VolumeContent::Block,
            },
            size: (kind == InstanceKind::VirtualMachine).then_some(ByteSize::gib(10)),
            source: image.map_or(VolumeSource::Empty, |image| VolumeSource::Image { image, full: false }),
        }
    }

    fn network(&self) -> NetworkSpec {
        NetworkSpec {
            id: NetworkId(self.env.uuid()),
            bridge: self.bridge.clone(),
            spec: BridgeSpec { ipv4: Some(self.ipv4), nat: true, ..Default::default() },
            hosts: vec![],
            acls: vec![],
            sets: vec![],
            forwards: vec![],
            owner: None,
        }
    }

    fn guest(&self, kind: InstanceKind, root: VolumeRef, network: NetworkId) -> GuestSpec {
        let instance = InstanceId(self.env.uuid());
        let bytes = instance.0.as_bytes();
        let vm = kind == InstanceKind::VirtualMachine;
        GuestSpec {
            application: None,
            memory: None,
            instance,
            kind,
            generation: Generation { incarnation: 1, n: 1 },
            spec_version: 1,
            hostname: "contract".into(),
            domain_id: 1,
            machine: vm.then(|| MachineSpec {
                machine: "pc-q35-7.2".into(),
                cpu_model: "max".into(),
                firmware: Firmware::Bios,
                uuid: instance.0,
                ports: 0,
                display: true,
                spice: true,
                screen: Default::default(),
                balloon: false,
                board: Default::default(),
                tpm: false,
                tpm_secret: None,
                stateful: false,
                boot_menu: false,
                windows: false,
                local_time: false,
                ends_on_reboot: false,
                halts_on_crash: false,
                iothreads: vec![],
                scsi_iothread: None,
                kernel: None,
                strings: vec![],
                lines: vec![line("second", 1, PortEnd::Stream {}), line("silent", 2, PortEnd::Null {})],
                given: vec![],
                resume: false,
                paused: false,
                fresh_firmware: false,
                accelerator: None,
            }),
            limits: Limits {
                cpu: Some(CpuLimit::Count { n: 1 }),
                memory: Some(ByteSize::mib(512)),
                ..Limits::default()
            },
            security: Security::default(),
            root: RootSpec {
                device: DeviceId(self.env.uuid()),
                name: "root".into(),
                slot: if vm { "virtio0" } else { "scsi0" }.into(),
                pool: root.pool,
                volume: root.volume,
                shared: false,
                io: Default::default(),
                pci: vm.then(|| "00:04.0".into()),
                boot_priority: 1,
                detached: false,
            },
            disks: vec![],
            nodes: vec![],
            proxies: vec![],
            nics: vec![NicSpec {
                device: DeviceId(self.env.uuid()),
                name: "eth0".into(),
                slot: "net0".into(),
                guest_name: "eth0".into(),
                mac: format!("10:66:6a:{:02x}:{:02x}:{:02x}", bytes[0], bytes[1], bytes[2]),
                link: NicLink::Network(network),
                host_interface: self.interface(),
                ipv4: None,
                ipv6: None,
                mtu: None,
                model: Default::default(),
                options: Default::default(),
                disconnected: false,
                pci: vm.then(|| "00:08.0".into()),
                boot_priority: 0,
                host_name: None,
                queue_length: None,
                vlans: Default::default(),
                port: None,
            }],
            cloud_init: CloudInit { instance_id: instance.to_string(), ..CloudInit::default() },
            files: vec![],
            environment: Default::default(),
        }
    }

    /// Asks again until `probe` has an answer, at most for `limit`.
    async fn until<T: Send>(
        &self,
        what: &str,
        limit: Duration,
        mut probe: impl AsyncFnMut() -> Option<T>,
    ) -> T {
        let began = self.env.monotonic();
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            assert!(self.env.monotonic() - began < limit, "{what}: not within {limit:?}");
            self.env.sleep(Duration::from_millis(20)).await;
        }
    }

    /// `call` must hang: it is dropped after a while.
    async fn stays_away<T: Send>(&self, call: impl Future<Output = T> + Send) {
        let outcome = self.env.timeout(Duration::from_millis(60), call).await;
        assert!(outcome.is_err(), "it was to wait");
    }
}

fn one(fds: Vec<OwnedFd>) -> OwnedFd {
    let mut fds = fds;
    assert_eq!(fds.len(), 1, "one descriptor");
    fds.remove(0)
}

/// A serial port.
fn line(name: &str, number: u32, to: PortEnd) -> LineSpec {
    LineSpec { name: name.into(), device: PortDevice { place: PortPlace::Serial { number }, to, log: None } }
}

fn refused<T: std::fmt::Debug>(outcome: Result<T>, kind: ErrorKind) -> Error {
    let error = outcome.expect_err("it was to be refused");
    assert_eq!(error.kind, kind, "{error:?}");
    assert!(!error.message.is_empty());
    error
}

/// Reads a descriptor to its end.
async fn read_all(fd: OwnedFd) -> Vec<u8> {
    tokio::task::spawn_blocking(move || {
        let mut data = vec![];
        let mut source = File::from(fd);
        let mut buffer = [0; 4096];
        // The master of a terminal ends with EIO.
        while let Ok(n @ 1..) = source.read(&mut buffer) {
            data.extend_from_slice(&buffer[..n]);
        }
        data
    })
    .await
    .unwrap()
}

/// Writes and closes.
async fn write_all(fd: OwnedFd, data: Vec<u8>) {
    tokio::task::spawn_blocking(move || File::from(fd).write_all(&data).unwrap()).await.unwrap();
}
