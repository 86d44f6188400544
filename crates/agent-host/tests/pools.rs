//! Pools whose disk comes late: told, tried again, never made anew.
#![allow(clippy::disallowed_methods)] // a real machine

#[path = "../../testkit/src/backends.rs"]
mod backends;

use karst_agent::{CallContext, Fence, HostAgent};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions, ids};
use karst_env::RealEnv;
use karst_model::{
    ErrorKind, NodeId, PoolId, SagaId,
    spec::{PoolSource, PoolSpec},
    storage::PoolKind,
};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

const LONG: Duration = Duration::from_secs(60);

fn daemon_id() -> String {
    format!("{:06x}", (std::process::id() & 0xf_ffff) | 0xd0_0000)
}

async fn agent(dir: &Path, source: &Path) -> Arc<RealAgent> {
    let policy = HostPolicy { pool_sources: vec![source.to_owned()], ..Default::default() };
    let options = RealOptions {
        dir: dir.to_owned(),
        daemon_id: daemon_id(),
        policy,
        worker: Some(("/nonexistent/worker".into(), vec![])),
    };
    RealAgent::open(RealEnv::shared(), options).await.unwrap()
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_whose_disk_comes_late_is_opened_then() {
    if !backends::root() {
        return;
    }
    let _claims = Claims;
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
    let first = agent(dir.path(), &disk).await;
    first.pool_ensure(&CallContext::mutate(LONG, fence), spec).await.unwrap();
    first.pool_usage(&read, id).await.unwrap();
    drop(first);

    // The disk is away; an empty directory is where it should be, as that of a mount that has not come yet.
    let away = dir.path().join("away");
    fs::rename(&disk, &away).unwrap();
    fs::create_dir(&disk).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o755)).unwrap();
    let again = agent(dir.path(), &disk).await;
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
    again.purge().await.unwrap();
}
