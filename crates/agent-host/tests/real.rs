//! The contract suite over the real agent: real containers of Karst's own Debian image on a real bridge; what a restart of
//! the agent finds; what it refuses.
#![allow(clippy::disallowed_methods)] // a real machine, real time

#[path = "../../testkit/src/backends.rs"]
mod backends;

use futures::FutureExt;
use karst_agent::{
    CallContext, Fence, HostAgent, ImageBuild, ImagePart, NetworkChoose,
    contract::{ImageSource, Subject},
};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions, ids};
use karst_env::RealEnv;
use karst_model::{ImageId, NodeId, SagaId, instance::InstanceKind};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

const LONG: Duration = Duration::from_secs(600);

fn target() -> PathBuf {
    // target/debug/deps/NAME
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

struct Place {
    dir: tempfile::TempDir,
    daemon_id: String,
    foreign: String,
}

impl Place {
    fn new() -> Option<Self> {
        if !backends::root() {
            return None;
        }
        for tool in ["/usr/bin/lxc-start", "/usr/bin/mmdebstrap", "/usr/sbin/dnsmasq", "/usr/sbin/nft"] {
            if !Path::new(tool).exists() {
                backends::missing(&format!("{tool} is not installed"));
                return None;
            }
        }
        run(env!("CARGO"), &["build", "-q", "-p", "karst-keeper", "-p", "karst-image", "--bins"]);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/build-guest-agent");
        run(script, &[target().join("debug").to_str().unwrap()]);
        let cache = target().join("test-cache");
        fs::create_dir_all(&cache).unwrap();
        // Those inside containers pass through it.
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o711)).unwrap();
        let dir = tempfile::Builder::new().prefix("agent-").tempdir_in(&cache).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        fs::create_dir(dir.path().join("saves")).unwrap();
        fs::set_permissions(dir.path().join("host"), fs::Permissions::from_mode(0o711)).unwrap();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::SeqCst);
        let daemon_id = format!("{:05x}{n:x}", std::process::id() & 0xf_ffff);
        let foreign = format!("kf{daemon_id}");
        run("ip", &["link", "add", &foreign, "type", "bridge"]);
        Some(Self { dir, daemon_id, foreign })
    }

    fn saves(&self) -> PathBuf {
        self.dir.path().join("saves")
    }

    async fn agent(&self) -> Arc<RealAgent> {
        let options = RealOptions {
            dir: self.dir.path().to_owned(),
            daemon_id: self.daemon_id.clone(),
            // What the contract asks of QEMU's monitor; without it all of that is refused.
            policy: HostPolicy {
                qemu_monitor: vec!["*".into()],
                qemu_events: true,
                save_paths: vec![self.saves()],
                ..HostPolicy::default()
            },
            worker: Some((target().join("debug/karst-image-worker"), vec![])),
        };
        RealAgent::open(RealEnv::shared(), options).await.unwrap()
    }

    async fn image(&self, agent: &RealAgent, kind: InstanceKind) -> ImageSource {
        if kind == InstanceKind::VirtualMachine && std::env::var_os("KARST_TEST_VM").is_none() {
            return small_machine();
        }
        let (name, root) = match kind {
            InstanceKind::Container => ("test-cache/debian-12-container", ImagePart::Rootfs),
            InstanceKind::VirtualMachine => ("test-cache/debian-12-vm-2", ImagePart::Disk),
        };
        let cache = target().join(name);
        let parts = [(ImagePart::Metadata, cache.join("metadata")), (root, cache.join("rootfs"))];
        if !cache.exists() {
            eprintln!("building an image by recipe");
            let image = ImageId(uuid::Uuid::new_v4());
            let request = ImageBuild { image, recipe: "debian/12".into(), kind };
            agent.image_build(&change(1), request).await.unwrap();
            let export = agent.image_export(&CallContext::read(LONG), image).await.unwrap();
            let making = cache.with_extension("making");
            let _ = fs::remove_dir_all(&making);
            fs::create_dir(&making).unwrap();
            for (file, fd) in export.value.iter().zip(export.fds) {
                let name = match file.part {
                    ImagePart::Metadata => "metadata",
                    _ => "rootfs",
                };
                let mut from = fs::File::from(fd);
                std::io::copy(&mut from, &mut fs::File::create(making.join(name)).unwrap()).unwrap();
            }
            fs::rename(making, &cache).unwrap();
            agent.image_delete(&change(1), image).await.unwrap();
        }
        ImageSource::Files(parts.to_vec())
    }
}

/// The cached image of `small-machine.sh`.
fn small_machine() -> ImageSource {
    // Grows with each change of the script; tests/e2e/lib.sh has it too.
    let cache = target().join("test-cache/small-machine-2");
    if !cache.exists() {
        let making = cache.with_extension("making");
        let _ = fs::remove_dir_all(&making);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/small-machine.sh");
        run(script, &["image", making.to_str().unwrap()]);
        fs::rename(making, &cache).unwrap();
    }
    let parts = [(ImagePart::Metadata, cache.join("metadata")), (ImagePart::Disk, cache.join("rootfs"))];
    ImageSource::Files(parts.to_vec())
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.foreign]).output();
        // What a test that failed before its purge has claimed.
        let ranges = ids::IdRanges::open(ids::CLAIMS, &self.daemon_id).unwrap();
        for claim in ranges.claims().unwrap() {
            ranges.release(claim.range, &claim.owner);
        }
        ranges.leave();
    }
}

fn change(epoch: u64) -> CallContext {
    let fence =
        Fence { saga: SagaId(uuid::Uuid::nil()), executor: NodeId(uuid::Uuid::nil()), epoch, step: 0 };
    CallContext::mutate(LONG, fence)
}

async fn subject(place: &Place, agent: &Arc<RealAgent>) -> Subject {
    let wanted = NetworkChoose { name: format!("kb{}", place.daemon_id), taken: vec![] };
    let choice = agent.network_choose(&CallContext::read(LONG), wanted).await.unwrap();
    Subject {
        agent: agent.clone(),
        env: RealEnv::shared(),
        daemon_id: place.daemon_id.clone(),
        epoch: AtomicU64::new(10),
        container: None,
        machine: None,
        bridge: choice.name,
        ipv4: choice.ipv4,
        foreign_bridge: Some(place.foreign.clone()),
        boot: Duration::from_secs(240),
        saves: Some(place.saves().to_str().unwrap().to_owned()),
        counter: AtomicU32::new(0),
    }
}

async fn contract_for(kind: InstanceKind) {
    let Some(place) = Place::new() else { return };
    let agent = place.agent().await;
    let image = Some(place.image(&agent, kind).await);
    let mut subject = subject(&place, &agent).await;
    match kind {
        InstanceKind::Container => subject.container = image,
        InstanceKind::VirtualMachine => subject.machine = image,
    }
    let outcome = std::panic::AssertUnwindSafe(subject.run()).catch_unwind().await;
    agent.purge().await.unwrap();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    let groups = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path());
    let left: Vec<_> =
        groups.map(|g| g.join(format!("karst-{}", place.daemon_id))).filter(|g| g.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers() {
    contract_for(InstanceKind::Container).await;
}

/// On a small machine, which boots in seconds also where it is emulated. With `KARST_TEST_VM` on Debian's, which takes a minute
/// to boot there, and whose image takes minutes to make.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines() {
    for tool in ["qemu-system-x86_64", "qemu-img", "busybox", "grub-mkimage"] {
        if !Path::new("/usr/bin").join(tool).exists() {
            return backends::missing(&format!("{tool} is not installed"));
        }
    }
    contract_for(InstanceKind::VirtualMachine).await;
}
