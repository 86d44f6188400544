//! The clean-slate check on a real machine: each kind of thing that Karst has outside of its records is left about on
//! purpose, and must be named; when it is gone, nothing is.
#![allow(clippy::disallowed_methods)] // a real machine

#[path = "../../testkit/src/backends.rs"]
mod backends;

use futures::FutureExt;
use karst_agent::{CallContext, HostAgent};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions, ids};
use karst_env::RealEnv;
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    panic::AssertUnwindSafe,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

fn run(argv: &[&str]) {
    let out = Command::new(argv[0]).args(&argv[1..]).output().unwrap();
    assert!(out.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Undoes what a failed test left.
struct Undo(Vec<Vec<String>>);

impl Drop for Undo {
    fn drop(&mut self) {
        for argv in &self.0 {
            let _ = Command::new(&argv[0]).args(&argv[1..]).output();
        }
    }
}

struct Running(Child);

impl Running {
    fn new(mut child: Child) -> Self {
        // Between exec and its arguments there is a moment in which a process shows none.
        let line = format!("/proc/{}/cmdline", child.id());
        let end = Instant::now() + Duration::from_secs(60);
        while fs::read(&line).unwrap().is_empty() {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < end, "{line} stays empty");
            std::thread::sleep(Duration::from_millis(1));
        }
        Self(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn leaks(agent: &RealAgent) -> Vec<String> {
    agent.self_check(&CallContext::read(Duration::from_secs(60)), ()).await.unwrap().leaks
}

/// Each entry of `planted` is named by exactly the words given, and nothing else is.
async fn found(agent: &RealAgent, words: &[&str]) {
    let leaks = leaks(agent).await;
    for word in words {
        assert!(leaks.iter().any(|l| l.contains(word)), "{word:?} is not among {leaks:#?}");
    }
    let unexpected: Vec<_> = leaks.iter().filter(|l| !words.iter().any(|w| l.contains(w))).collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_leak_is_named() {
    if !backends::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let host = dir.path().join("host");
    fs::create_dir(&host).unwrap();
    fs::set_permissions(&host, fs::Permissions::from_mode(0o711)).unwrap();
    let id = format!("{:06x}", (std::process::id() & 0xf_ffff) | 0xe0_0000);
    let agent = RealAgent::open(
        RealEnv::shared(),
        RealOptions {
            dir: dir.path().to_owned(),
            daemon_id: id.clone(),
            policy: HostPolicy::default(),
            worker: Some(("/nonexistent/worker".into(), vec![])),
        },
    )
    .await
    .unwrap();
    let outcome = AssertUnwindSafe(plant(&agent, &host, &id)).catch_unwind().await;
    let undo = match outcome {
        Ok(undo) => undo,
        Err(panic) => {
            let _ = agent.purge().await;
            std::panic::resume_unwind(panic);
        }
    };
    // What will not go is named, and everything else is gone all the same.
    let busy = host.join("networks/busy");
    fs::create_dir_all(&busy).unwrap();
    run(&["mount", "-t", "tmpfs", "none", busy.to_str().unwrap()]);
    let locks = liblxc(&host);
    fs::create_dir_all(locks.join("guests/x")).unwrap();
    let claims = || ids::IdRanges::open(ids::CLAIMS, &id).unwrap().claims().unwrap();
    assert_eq!(claims().len(), 1, "the worker's");
    let refused = agent.purge().await;
    run(&["umount", busy.to_str().unwrap()]);
    let refused = refused.unwrap_err();
    assert!(refused.message.contains("networks: "), "{refused}");
    assert!(claims().is_empty() && !locks.exists(), "{:?}", claims());
    agent.purge().await.unwrap();
    assert!(!busy.exists());
    drop(undo);
    let left = agent.self_check(&CallContext::read(Duration::from_secs(60)), ()).await.unwrap();
    assert!(left.leaks.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_be_observed_is_named_and_the_rest_is_looked_at() {
    if !backends::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    let guest = "00000000-0000-4000-8000-0000000000ab";
    let of_guest = host.join("guests").join(guest);
    fs::create_dir_all(&of_guest).unwrap();
    for open in [dir.path(), &host, &host.join("guests"), &of_guest] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let record = serde_json::json!({
        "kind": "container",
        "generation": {"incarnation": 1, "n": 1},
        "ids": {"base": 1, "count": 1},
        "pool": "00000000-0000-4000-8000-0000000000ac",
        "root": "00000000-0000-4000-8000-0000000000ad",
        "interfaces": [],
        "networks": [],
    });
    fs::write(of_guest.join("agent.json"), record.to_string()).unwrap();
    // What its driver has written of it can neither be read nor be as good as none.
    fs::create_dir(of_guest.join("guest.json")).unwrap();
    let agent = RealAgent::open(
        RealEnv::shared(),
        RealOptions {
            dir: dir.path().to_owned(),
            daemon_id: format!("{:06x}", (std::process::id() & 0xf_ffff) | 0xd0_0000),
            policy: HostPolicy::default(),
            worker: Some(("/nonexistent/worker".into(), vec![])),
        },
    )
    .await
    .unwrap();
    let observed = format!("guest {guest} cannot be observed: ");
    let root = format!("guest {guest} without its root volume");
    let stray = host.join("pools/left");
    fs::create_dir_all(&stray).unwrap();
    let outcome = AssertUnwindSafe(found(&agent, &[&observed, &root, "directory of an unknown pool left"]))
        .catch_unwind()
        .await;
    fs::remove_dir(of_guest.join("guest.json")).unwrap();
    let after = AssertUnwindSafe(leaks(&agent)).catch_unwind().await;
    let purged = agent.purge().await;
    outcome.unwrap();
    let after = after.unwrap();
    assert!(!after.iter().any(|l| l.contains("observed")), "{after:#?}");
    purged.unwrap();
}

/// Where liblxc keeps its locks of what lies in a directory.
fn liblxc(of: &Path) -> std::path::PathBuf {
    Path::new("/run/lxc/lock").join(of.strip_prefix("/").unwrap())
}

async fn plant(agent: &Arc<RealAgent>, host: &Path, id: &str) -> Undo {
    let guest = "00000000-0000-4000-8000-0000000000aa";
    let link = format!("k{id}00000001");
    let bridge = format!("kx{id}");
    let table = format!("karst_{id}");
    let mount = host.join("left");
    let busy = host.join("networks/busy").display().to_string();
    let undo = Undo(
        [
            vec!["ip", "link", "delete", &link],
            vec!["ip", "link", "delete", &bridge],
            vec!["nft", "delete", "table", "inet", &table],
            vec!["nft", "delete", "table", "ip", &table],
            vec!["umount", "-l", mount.to_str().unwrap()],
            vec!["umount", "-l", &busy],
        ]
        .into_iter()
        .map(|argv| argv.into_iter().map(str::to_owned).collect())
        .collect(),
    );
    found(agent, &[]).await;

    run(&["ip", "link", "add", &link, "type", "bridge"]);
    found(agent, &[&format!("interface {link}")]).await;
    run(&["ip", "link", "delete", &link]);

    run(&["ip", "link", "add", &bridge, "type", "bridge"]);
    run(&["ip", "link", "set", &bridge, "alias", &format!("karst:{id}:{guest}")]);
    found(agent, &[&format!("bridge {bridge}")]).await;
    run(&["ip", "link", "delete", &bridge]);

    for family in ["inet", "ip"] {
        run(&["nft", "add", "table", family, &table]);
        found(agent, &[&format!("nft table {family} {table}")]).await;
        run(&["nft", "delete", "table", family, &table]);
    }

    let group = format!("karst-{id}/{guest}");
    let cgroups = karst_host::cgroup::Cgroups::detect().unwrap();
    cgroups.create(&group).unwrap();
    found(agent, &[&format!("karst-{id}/{guest}")]).await;
    cgroups.remove(&format!("karst-{id}")).await.unwrap();

    let ranges = ids::IdRanges::open(ids::CLAIMS, id).unwrap();
    let range = ranges.claim(guest, None).unwrap();
    found(agent, &[&format!("id range {} of {guest}", range.base)]).await;
    ranges.release(range, guest);

    fs::create_dir(&mount).unwrap();
    run(&["mount", "-t", "tmpfs", "none", mount.to_str().unwrap()]);
    found(agent, &[&format!("mount {}", mount.display())]).await;
    run(&["umount", mount.to_str().unwrap()]);

    let file = host.join("lost.img");
    fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let attached = karst_host::mount::attach(&file).unwrap();
    found(agent, &[&format!("loop device {} of {}", attached.path.display(), file.display())]).await;
    drop(attached);
    // Whoever looks into every new device may have it open for a moment longer.
    for _ in 0..400 {
        if karst_host::mount::attached(&file).is_none() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    let mut keeper = Command::new("/bin/sh");
    keeper.arg0("karst-keeper").args(["-c", "read x", "keeper"]);
    keeper.arg(host.join("guests").join(guest)).stdin(Stdio::piped());
    let keeper = Running::new(keeper.spawn().unwrap());
    found(agent, &[&format!("process {}: karst-keeper", keeper.0.id())]).await;
    drop(keeper);

    let network = host.join("networks").join(guest);
    fs::create_dir_all(&network).unwrap();
    let conf = network.join("dnsmasq.conf");
    let quiet = "keep-in-foreground\nport=0\nuser=root\npid-file\n";
    fs::write(&conf, quiet).unwrap();
    let mut dnsmasq = Command::new("/usr/sbin/dnsmasq");
    dnsmasq.arg0("dnsmasq").arg(format!("--conf-file={}", conf.display()));
    let dnsmasq = Running::new(dnsmasq.stderr(Stdio::null()).spawn().unwrap());
    let process = format!("process {}: dnsmasq of no network", dnsmasq.0.id());
    found(agent, &[&process, "which is not recorded"]).await;
    drop(dnsmasq);
    fs::remove_dir_all(&network).unwrap();

    let lock = liblxc(host).join("guests").join(guest);
    fs::create_dir_all(&lock).unwrap();
    found(agent, &[&format!("lock of liblxc for no guest: {guest}")]).await;
    fs::remove_dir(&lock).unwrap();

    for (path, words) in [
        ("staging/left", "staged file left of no upload".to_owned()),
        ("pools/left", "directory of an unknown pool left".to_owned()),
        (&*format!("guests/{guest}"), format!("state directory of an unknown guest {guest}")),
    ] {
        let path = host.join(path);
        fs::create_dir_all(&path).unwrap();
        found(agent, &[&words]).await;
        fs::remove_dir_all(&path).unwrap();
    }
    found(agent, &[]).await;
    undo
}
