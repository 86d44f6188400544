//! Pools that grow while they are in use. Pools whose disk comes late: told, tried again, never made anew. What a power cut
//! tore: a guest's record, a snapshot.
#![allow(clippy::disallowed_methods)] // a real machine

#[path = "../../testkit/src/backends.rs"]
mod backends;

use karst_agent::{CallContext, Fence, HostAgent, PoolGrow, VolumeSnapshotRef};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions, ids};
use karst_env::RealEnv;
use karst_model::{
    ByteSize, ErrorKind, NodeId, PoolId, SagaId, SnapshotId, VolumeId,
    spec::{PoolSource, PoolSpec, VolumeSource, VolumeSpec},
    storage::{PoolKind, VolumeContent},
};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

const LONG: Duration = Duration::from_secs(60);

/// Of each test another: what a daemon's claims are it knows by it.
fn daemon_id(test: u32) -> String {
    format!("{:06x}", (std::process::id() & 0xf_ffff) | ((0xc + test) << 20))
}

async fn agent(test: u32, dir: &Path, source: &Path) -> Arc<RealAgent> {
    let trial_pools = vec![PoolKind::Zfs, PoolKind::Lvm];
    let policy = HostPolicy { pool_sources: vec![source.to_owned()], trial_pools, ..Default::default() };
    let options = RealOptions {
        dir: dir.to_owned(),
        daemon_id: daemon_id(test),
        policy,
        worker: Some(("/nonexistent/worker".into(), vec![])),
    };
    RealAgent::open(RealEnv::shared(), options).await.unwrap()
}

/// Gives the claims of user ids back, also when the test fails.
struct Claims(u32);

impl Drop for Claims {
    fn drop(&mut self) {
        let ranges = ids::IdRanges::open(ids::CLAIMS, &daemon_id(self.0)).unwrap();
        for claim in ranges.claims().unwrap() {
            ranges.release(claim.range, &claim.owner);
        }
        ranges.leave();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_whose_disk_comes_late_is_opened_then() {
    if !backends::root() {
        return;
    }
    let _claims = Claims(0);
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    let disk = dir.path().join("disk");
    for (path, mode) in [(dir.path(), 0o711), (&host, 0o711), (&disk, 0o755)] {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let read = CallContext::read(LONG);
    let fence =
        Fence { saga: SagaId(uuid::Uuid::nil()), executor: NodeId(uuid::Uuid::nil()), epoch: 1, step: 0 };
    let id = PoolId(uuid::Uuid::new_v4());
    let spec = PoolSpec {
        source: PoolSource::Granted { source: disk.to_string_lossy().into_owned() },
        ..PoolSpec::own(id, PoolKind::Dir)
    };
    let first = agent(0, dir.path(), &disk).await;
    let change = CallContext::mutate(LONG, fence);
    first.pool_ensure(&change, spec.clone()).await.unwrap();
    first.pool_usage(&read, id).await.unwrap();
    drop(first);

    // The disk is away; an empty directory is where it should be, as that of a mount that has not come yet.
    let away = dir.path().join("away");
    fs::rename(&disk, &away).unwrap();
    fs::create_dir(&disk).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o755)).unwrap();
    let again = agent(0, dir.path(), &disk).await;
    let warnings = async || again.host_facts(&read, ()).await.unwrap().warnings;
    let told =
        |all: &[String]| all.iter().any(|w| w.contains(&id.to_string()) && w.contains("cannot be opened"));
    assert!(told(&warnings().await), "{:?}", warnings().await);
    let refused = again.pool_usage(&read, id).await.unwrap_err();
    assert!(refused.is(ErrorKind::Unavailable) && refused.message.contains("tried again"), "{refused}");
    assert_eq!(fs::read_dir(&disk).unwrap().count(), 0, "nothing was made in its place");

    fs::remove_dir(&disk).unwrap();
    fs::rename(&away, &disk).unwrap();
    for _ in 0..600 {
        if again.pool_usage(&read, id).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    again.pool_usage(&read, id).await.expect("open without a restart");
    assert!(!told(&warnings().await));

    // One that was let go of is not opened by a restart, nor missed, and what hides it is no reason to make it anew.
    again.pool_close(&change, id).await.unwrap();
    let refused = again.pool_usage(&read, id).await.unwrap_err();
    assert!(refused.is(ErrorKind::Conflict) && refused.message.contains("not active"), "{refused}");
    drop(again);
    fs::rename(&disk, &away).unwrap();
    fs::create_dir(&disk).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o755)).unwrap();
    let third = agent(0, dir.path(), &disk).await;
    assert!(!told(&third.host_facts(&read, ()).await.unwrap().warnings));
    assert!(third.pool_usage(&read, id).await.unwrap_err().is(ErrorKind::Conflict));
    assert!(third.pool_open(&change, spec.clone()).await.unwrap_err().is(ErrorKind::Unavailable));
    assert_eq!(fs::read_dir(&disk).unwrap().count(), 0, "nothing was made in its place");
    fs::remove_dir(&disk).unwrap();
    fs::rename(&away, &disk).unwrap();
    third.pool_open(&change, spec).await.unwrap();
    third.pool_usage(&read, id).await.unwrap();
    third.purge().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_record_of_a_guest_keeps_nobody_else_from_going_on() {
    if !backends::root() {
        return;
    }
    let _claims = Claims(1);
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    for path in [dir.path(), &host] {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
    }
    drop(agent(1, dir.path(), dir.path()).await);
    // As a power cut would leave them.
    let [container, machine] = [(), ()].map(|()| host.join("guests").join(uuid::Uuid::new_v4().to_string()));
    for guest in [&container, &machine] {
        fs::create_dir(guest).unwrap();
        fs::write(guest.join("agent.json"), "").unwrap();
    }
    fs::write(machine.join("nvram.fd"), "what a machine is").unwrap();
    let again = agent(1, dir.path(), dir.path()).await;
    assert!(!container.exists(), "nothing of it is left, nor was there anything to be lost");
    assert_eq!(fs::read_to_string(machine.join("nvram.fd")).unwrap(), "what a machine is");
    again.purge().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_the_power_cut_short_is_taken_again() {
    if !backends::root() {
        return;
    }
    let _claims = Claims(2);
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    for path in [dir.path(), &host] {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let agent = agent(2, dir.path(), dir.path()).await;
    let fence =
        Fence { saga: SagaId(uuid::Uuid::nil()), executor: NodeId(uuid::Uuid::nil()), epoch: 1, step: 0 };
    let change = CallContext::mutate(LONG, fence);
    let pool = PoolId(uuid::Uuid::new_v4());
    agent.pool_ensure(&change, PoolSpec::own(pool, PoolKind::Dir)).await.unwrap();
    let (volume, snapshot) = (VolumeId(uuid::Uuid::new_v4()), SnapshotId(uuid::Uuid::new_v4()));
    let spec = VolumeSpec {
        pool,
        id: volume,
        content: VolumeContent::Filesystem,
        size: None,
        source: VolumeSource::Empty,
    };
    agent.volume_create(&change, spec).await.unwrap();
    let at = VolumeSnapshotRef { pool, volume, snapshot };
    agent.volume_snapshot_create(&change, at).await.unwrap();
    let mark = host.join(format!("pools/{}/snapshots/{}/{}/unflushed", pool.0, volume.0, snapshot.0));
    assert!(mark.parent().unwrap().exists() && !mark.exists(), "it is on disk when it is told of");
    fs::write(&mark, "another boot").unwrap();
    agent.volume_snapshot_restore(&change, at).await.unwrap_err();
    agent.volume_snapshot_create(&change, at).await.expect("the step is done again");
    agent.volume_snapshot_restore(&change, at).await.expect("now it is whole");
    agent.purge().await.unwrap();
}

/// Can this machine have a pool of this kind in a file?
fn can_have(kind: PoolKind) -> bool {
    let there = |path: &str| Path::new(path).exists();
    let (can, what) = match kind {
        PoolKind::Zfs => (there("/dev/zfs"), backends::Optional::Zfs),
        PoolKind::Lvm => {
            (there("/dev/mapper/control") && there("/dev/loop-control"), backends::Optional::DeviceMapper)
        }
        _ => {
            let known = fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("btrfs");
            (known && there("/dev/loop-control"), backends::Optional::LoopDevices)
        }
    };
    if !can {
        backends::absent(what);
    }
    can
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_in_files_of_their_own_grow() {
    if !backends::root() {
        return;
    }
    let _claims = Claims(3);
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    for path in [dir.path(), &host] {
        fs::create_dir_all(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let read = CallContext::read(LONG);
    let fence =
        Fence { saga: SagaId(uuid::Uuid::nil()), executor: NodeId(uuid::Uuid::nil()), epoch: 1, step: 0 };
    let change = CallContext::mutate(LONG, fence);
    let mut first = agent(3, dir.path(), dir.path()).await;
    for kind in [PoolKind::Btrfs, PoolKind::Zfs, PoolKind::Lvm] {
        if !can_have(kind) {
            continue;
        }
        let id = PoolId(uuid::Uuid::new_v4());
        let source = |size: ByteSize| PoolSource::Own { size: Some(size) };
        let small = PoolSpec { source: source(ByteSize::mib(512)), ..PoolSpec::own(id, kind) };
        first.pool_ensure(&change, small.clone()).await.unwrap();
        let found = host.join(format!("registry/pools/{}.found", id.0));
        let can = first.pool_abilities(&read, id).await.unwrap();
        assert_eq!(
            (can.is_some(), found.is_file()),
            (kind == PoolKind::Btrfs, kind == PoolKind::Btrfs),
            "{kind:?}"
        );
        let space = async |agent: &RealAgent| agent.pool_usage(&read, id).await.unwrap().total;
        let before = space(&first).await;
        let grow = |size| PoolGrow { pool: id, size };
        // Twice is once; smaller is refused, and changes nothing.
        for _ in 0..2 {
            first.pool_grow(&change, grow(ByteSize::gib(1))).await.unwrap();
            let after = space(&first).await;
            assert!(after >= before + (400 << 20), "{kind:?}: {before} became {after}");
        }
        let refused = first.pool_grow(&change, grow(ByteSize::mib(600))).await.unwrap_err();
        assert_eq!((refused.kind, refused.field.as_deref()), (ErrorKind::Conflict, Some("config.size")));
        let large = space(&first).await;
        // Let go of, nobody has it until it is opened, whatever daemon comes.
        for _ in 0..2 {
            first.pool_close(&change, id).await.unwrap();
        }
        drop(first);
        first = agent(3, dir.path(), dir.path()).await;
        assert_eq!(first.pool_usage(&read, id).await.unwrap_err().kind, ErrorKind::Conflict, "{kind:?}");
        first.pool_open(&change, small.clone()).await.unwrap();
        assert_eq!(space(&first).await, large, "{kind:?}");
        // It is as large after a restart, and the same pool to who knows it as it was made.
        drop(first);
        first = agent(3, dir.path(), dir.path()).await;
        assert_eq!(space(&first).await, large, "{kind:?}");
        first.pool_ensure(&change, small).await.unwrap();
        first.pool_remove(&change, id).await.unwrap();
        assert!(!found.exists(), "what was found goes with it");
    }
    first.purge().await.unwrap();
}
