//! Backups that the host has no room for, made by the real worker: broken off in the middle, named, and nothing is left.
#![allow(clippy::disallowed_methods)] // a real machine

#[path = "../../testkit/src/backends.rs"]
mod backends;

use karst_agent::{BackupCreate, BackupFacts, BackupKind, CallContext, Fence, HostAgent, VolumeRef};
use karst_agent_host::{BackupLimits, HostPolicy, RealAgent, RealOptions, ids};
use karst_env::RealEnv;
use karst_model::{
    BackupId, ByteSize, ErrorKind, NodeId, PoolId, Result, SagaId, VolumeId,
    backup::Compression,
    spec::{PoolSpec, VolumeSource, VolumeSpec},
    storage::{PoolKind, VolumeContent},
};
use std::{
    fs,
    io::Read,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    process::Command,
    time::Duration,
};

const LONG: Duration = Duration::from_secs(120);

fn daemon_id() -> String {
    format!("{:06x}", (std::process::id() & 0xf_ffff) | 0xb0_0000)
}

/// Gives the claims of user ids back, also when the test fails.
struct Claims;

impl Drop for Claims {
    fn drop(&mut self) {
        let ranges = ids::IdRanges::open(ids::CLAIMS, &daemon_id()).unwrap();
        for claim in ranges.claims().unwrap() {
            ranges.release(claim.range, &claim.owner);
        }
        ranges.leave();
    }
}

fn change() -> CallContext {
    let fence =
        Fence { saga: SagaId(uuid::Uuid::nil()), executor: NodeId(uuid::Uuid::nil()), epoch: 1, step: 0 };
    CallContext::mutate(LONG, fence)
}

async fn back_up(agent: &RealAgent, volume: VolumeRef) -> Result<BackupFacts> {
    let request = BackupCreate {
        id: BackupId(uuid::Uuid::new_v4()),
        kind: BackupKind::Block,
        volume,
        at: None,
        snapshots: vec![],
        index: serde_json::json!({"name": "v", "config": {}}),
        metadata: None,
        templates: Default::default(),
        compression: Compression::None,
        machine: None,
    };
    agent.backup_create(&change(), request).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_broken_off_and_leaves_nothing() {
    if !backends::root() {
        return;
    }
    // target/debug/deps/NAME
    let target: PathBuf = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    let built =
        Command::new(env!("CARGO")).args(["build", "-q", "-p", "karst-image", "--bins"]).status().unwrap();
    assert!(built.success());
    let _claims = Claims;
    // Where workers can be granted files.
    let cache = target.join("test-cache");
    fs::create_dir_all(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o711)).unwrap();
    let dir = tempfile::Builder::new().prefix("backups-").tempdir_in(&cache).unwrap();
    let host = dir.path().join("host");
    for path in [dir.path(), &host] {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let backups = BackupLimits { number: 2, total: Some(ByteSize::mib(8)), reserve: ByteSize(0) };
    let options = RealOptions {
        dir: dir.path().to_owned(),
        daemon_id: daemon_id(),
        policy: HostPolicy { backups, ..Default::default() },
        worker: Some((target.join("debug/karst-image-worker"), vec![])),
    };
    let agent = RealAgent::open(RealEnv::shared(), options).await.unwrap();
    let pool = PoolId(uuid::Uuid::new_v4());
    agent.pool_ensure(&change(), PoolSpec::own(pool, PoolKind::Dir)).await.unwrap();
    let volume = async |mib: u64| {
        let id = VolumeId(uuid::Uuid::new_v4());
        let spec = VolumeSpec {
            id,
            pool,
            content: VolumeContent::Block,
            size: Some(ByteSize::mib(mib)),
            source: VolumeSource::Empty,
        };
        agent.volume_create(&change(), spec).await.unwrap();
        let mut bytes = vec![];
        fs::File::open("/dev/urandom").unwrap().take(mib << 20).read_to_end(&mut bytes).unwrap();
        let disk = host.join(format!("pools/{}/volumes/{}/disk.img", pool.0, id.0));
        fs::File::options().write(true).open(disk).unwrap().write_all_at(&bytes, 0).unwrap();
        VolumeRef { pool, volume: id }
    };
    let kept = || fs::read_dir(host.join("backups")).unwrap().count();
    let (large, small) = (volume(32).await, volume(2).await);

    let e = back_up(&agent, large).await.unwrap_err();
    assert!(e.is(ErrorKind::Quota) && e.message.contains("may take 8MiB together"), "{e}: {:?}", e.context);
    assert_eq!(kept(), 0, "nothing of it is left");
    // Others go on.
    for _ in 0..2 {
        assert!(back_up(&agent, small).await.unwrap().size > 2 << 20);
    }
    let e = back_up(&agent, small).await.unwrap_err();
    assert!(e.is(ErrorKind::Quota) && e.message.contains("keeps 2 backups"), "{e}");
    assert_eq!(kept(), 2);
    agent.purge().await.unwrap();
}
