//! A control process that turned against its host: it has the socket and control's user, and tries what the wire allows.
//! The host survives, and nothing outside its own objects changes.
#![allow(clippy::disallowed_methods)] // real processes, real time

use karst_agent::{
    Call, CallContext, Client, Fence, FileRef, HostAgent, NetworkChoose, VolumeRef,
    names::host_interface,
    wire::{Frame, FrameReader, FromHost, MAX_FRAME, ToHost},
};
use karst_env::{EnvExt, RealEnv};
use karst_model::{
    ErrorKind, NetworkId, NodeId, PoolId, SagaId, VolumeId, instance::InstanceKind, network::BridgeSpec,
    spec::*,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

const LONG: Duration = Duration::from_secs(60);

fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(n)
}

fn change(epoch: u64) -> CallContext {
    let fence = Fence { saga: SagaId(id(0)), executor: NodeId(uuid::Uuid::nil()), epoch, step: 0 };
    CallContext::mutate(LONG, fence)
}

fn read() -> CallContext {
    CallContext::read(LONG)
}

struct Karstd {
    child: Child,
    dir: PathBuf,
    bridge: String,
    _base: tempfile::TempDir,
}

impl Drop for Karstd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("ip").args(["link", "delete", &self.bridge]).output();
    }
}

fn start() -> Option<Karstd> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let base = tempfile::Builder::new().prefix("karstd-h").tempdir().unwrap();
    fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let dir = base.path().join("k");
    // The true control process cannot open its store and stays away: we are control here.
    let state = dir.join("state");
    fs::create_dir_all(state.join("karst.db")).unwrap();
    for (path, mode) in [(&dir, 0o711), (&state, 0o700)] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    let nobody = fs::read_to_string("/etc/passwd").unwrap();
    let nobody = nobody.lines().find(|l| l.starts_with("nobody:")).unwrap().split(':').nth(2).unwrap();
    std::os::unix::fs::chown(&state, Some(nobody.parse().unwrap()), None).unwrap();
    let bridge = format!("kh{:x}", std::process::id());
    let made = Command::new("ip").args(["link", "add", &bridge, "type", "bridge"]).status().unwrap();
    assert!(made.success());
    let child = Command::new(env!("CARGO_BIN_EXE_karstd"))
        .arg("--dir")
        .arg(&dir)
        .args(["--user", "nobody"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + LONG;
    while !dir.join("run/daemons.json").exists() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    Some(Karstd { child, dir, bridge, _base: base })
}

/// Everything on the machine that it might have changed: links, files beside DIR, mounts of this namespace.
fn surroundings(karstd: &Karstd) -> Vec<String> {
    let name = |e: fs::DirEntry| e.file_name().into_string().unwrap();
    let foreign = fs::read_dir(format!("/sys/class/net/{}/brif", karstd.bridge)).unwrap().flatten().map(name);
    let operstate = fs::read_to_string(format!("/sys/class/net/{}/operstate", karstd.bridge)).unwrap();
    let addresses =
        Command::new("ip").args(["-o", "addr", "show", "dev", &karstd.bridge]).output().unwrap().stdout;
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let beside = fs::read_dir(karstd.dir.parent().unwrap()).unwrap().flatten().map(name);
    foreign.chain([operstate, String::from_utf8(addresses).unwrap(), passwd]).chain(beside).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_control_process() {
    let Some(karstd) = start() else { return };
    let before = surroundings(&karstd);
    let env = RealEnv::shared();
    let socket = karstd.dir.join("run/host.sock");
    let agent = Client::connect(
        env.clone(),
        &socket,
        Some(karst_agent::Executor { node: NodeId(uuid::Uuid::nil()), epoch: 5 }),
    )
    .await
    .unwrap()
    .agent();
    let daemon = fs::read_to_string(karstd.dir.join("id")).unwrap().trim().to_owned();
    let host_pid = || {
        let text = fs::read(karstd.dir.join("run/daemons.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["daemons"]["host"]["pid"].clone()
    };
    let pid = host_pid();
    let refused = |outcome: karst_model::Result<()>, kinds: &[ErrorKind]| {
        let e = outcome.expect_err("it was to be refused");
        assert!(kinds.contains(&e.kind), "{e:?}");
    };

    // Bridges and interfaces of others.
    let network = |bridge: &str| NetworkSpec {
        id: NetworkId(id(1)),
        bridge: bridge.into(),
        spec: BridgeSpec { ipv4: Some("10.213.77.1/24".parse().unwrap()), nat: true, ..Default::default() },
        hosts: vec![],
        acls: vec![],
        sets: vec![],
        forwards: vec![],
    };
    let taken = [ErrorKind::Conflict, ErrorKind::Invalid];
    for bridge in [karstd.bridge.as_str(), "lo", "../../etc/x", "a b", "", "-j", "x/y", "all", "default"] {
        refused(agent.network_ensure(&change(5), network(bridge)).await, &taken);
    }
    agent.network_remove(&change(5), NetworkId(id(1))).await.unwrap();
    let mut evil = network("khostile0");
    evil.spec.domain = "x\ndhcp-script=/tmp/x".into();
    refused(agent.network_ensure(&change(5), evil).await, &taken);
    let mut evil = network("khostile0");
    evil.hosts = vec![NetworkHost {
        mac: "10:66:6a:00:00:01,\naddn-hosts=/etc/shadow".into(),
        hostname: "x\nx".into(),
        ..Default::default()
    }];
    refused(agent.network_ensure(&change(5), evil).await, &taken);
    agent.network_remove(&change(5), NetworkId(id(1))).await.unwrap();
    // Interfaces of the host, and names that would become nft's text.
    let forbidden = [ErrorKind::Forbidden];
    let mut evil = network("khostile0");
    evil.spec.external_interfaces = vec![karstd.bridge.clone()];
    refused(agent.network_ensure(&change(5), evil).await, &forbidden);
    let mut evil = network("khostile0");
    let port = PortSpec { interface: karstd.bridge.clone(), mac_filter: true, ..Default::default() };
    evil.hosts = vec![NetworkHost {
        mac: "10:66:6a:00:00:01".into(),
        hostname: "x".into(),
        port: Some(port),
        ..Default::default()
    }];
    refused(agent.network_ensure(&change(5), evil).await, &forbidden);
    let mut evil = network("khostile0");
    evil.acls = vec![karst_model::firewall::AclSpec {
        id: karst_model::AclId(id(4)),
        name: "x\"; add table inet evil; #".into(),
        ingress: vec![],
        egress: vec![],
    }];
    refused(agent.network_ensure(&change(5), evil).await, &taken);
    agent.network_remove(&change(5), NetworkId(id(1))).await.unwrap();
    let name = "$(reboot)".to_owned();
    refused(agent.network_choose(&read(), NetworkChoose { name, taken: vec![] }).await.map(drop), &taken);

    // A guest whose parts are not its own, and whose texts are more than texts.
    let pool = PoolSpec::own(PoolId(id(2)), karst_model::storage::PoolKind::Dir);
    agent.pool_ensure(&change(5), pool.clone()).await.unwrap();
    let volume = VolumeSpec {
        id: VolumeId(id(3)),
        pool: pool.id,
        content: karst_model::storage::VolumeContent::Filesystem,
        size: None,
        source: VolumeSource::Empty,
    };
    agent.volume_create(&change(5), volume.clone()).await.unwrap();
    let guest = |change: &dyn Fn(&mut serde_json::Value)| -> karst_model::Result<GuestSpec> {
        let mut spec = serde_json::json!({
            "instance": id(4), "kind": "container", "generation": {"incarnation": 1, "n": 1}, "spec_version": 1,
            "hostname": "c1", "domain_id": 1, "machine": null,
            "limits": {"cpu": null, "cpu_allowance": null, "memory": null, "processes": null},
            "root": {"device": id(5), "name": "root", "slot": "scsi0", "pool": pool.id, "volume": volume.id},
            "nics": [{"device": id(6), "name": "eth0", "slot": "net0", "guest_name": "eth0", "mac": "10:66:6a:00:00:02",
                      "network": id(1), "host_interface": host_interface(&daemon, 1)}],
            "cloud_init": {"instance_id": "x"}, "environment": {},
        });
        change(&mut spec);
        Ok(serde_json::from_value(spec)?)
    };
    let bad = [ErrorKind::Invalid, ErrorKind::NotFound, ErrorKind::Conflict, ErrorKind::Unsupported];
    for (at, value) in [
        ("/hostname", serde_json::json!("c1\nlxc.hook.start = /bin/sh")),
        ("/hostname", serde_json::json!("../../etc")),
        ("/nics/0/host_interface", serde_json::json!(karstd.bridge)),
        ("/nics/0/host_interface", serde_json::json!("lo")),
        ("/nics/0/host_interface", serde_json::json!("../x")),
        ("/nics/0/network", serde_json::json!(id(99))),
        ("/root/volume", serde_json::json!(id(99))),
        ("/root/pool", serde_json::json!(id(99))),
        ("/kind", serde_json::json!("virtual-machine")),
    ] {
        let spec = guest(&|s| *s.pointer_mut(at).unwrap() = value.clone()).unwrap();
        refused(agent.guest_start(&change(5), spec).await.map(drop), &bad);
    }
    let evil = guest(&|s| {
        s["nics"] = serde_json::json!([]);
        s["environment"] = serde_json::json!({"X": "1\nlxc.hook.pre-start = /bin/touch /tmp/karst-hostile"});
    });
    refused(agent.guest_start(&change(5), evil.unwrap()).await.map(drop), &bad);

    // Files: through links and upwards, of a volume and of none.
    let file = |volume: u128, path: &str| FileRef {
        instance: id(4).into(),
        kind: InstanceKind::Container,
        root: VolumeRef { pool: pool.id, volume: VolumeId(id(volume)) },
        path: path.into(),
    };
    for (volume, path) in [
        (3, "/../../../etc/passwd"),
        (3, "etc/passwd"),
        (99, "/etc/passwd"),
        (3, "/proc/1/root/etc/shadow"),
        (3, "/etc/shadow"),
        (3, "/a\0b"),
    ] {
        refused(agent.file_open(&read(), file(volume, path)).await.map(drop), &bad);
        refused(agent.file_delete(&read(), file(volume, path)).await, &bad);
    }

    // A lower epoch, and none.
    refused(agent.pool_remove(&change(4), pool.id).await, &[ErrorKind::Conflict]);
    refused(agent.pool_remove(&read(), pool.id).await, &[ErrorKind::Conflict]);

    // Raw frames: unknown calls, garbage, huge, descriptors, and many connections.
    let raw = async || {
        let stream = Arc::new(UnixStream::connect(&socket).await.unwrap());
        let hello = ToHost::Hello { versions: (1, 1), executor: None };
        Frame::new(&hello, vec![]).unwrap().send(&stream).await.unwrap();
        let mut reader = FrameReader::new(stream.clone(), true);
        reader.next::<FromHost>().await.unwrap().unwrap();
        (stream, reader)
    };
    for call in ["shell", "mount", "run", Call::NAMES[0]] {
        let (stream, mut reader) = raw().await;
        let call = serde_json::json!({"call": call, "request": {"path": "/etc/shadow"}});
        let request = ToHost::Request { id: 1, context: read(), call };
        Frame::new(&request, vec![]).unwrap().send(&stream).await.unwrap();
        assert!(reader.next::<FromHost>().await.unwrap().is_some(), "answered, not fatal");
    }
    for bytes in [
        &[0xff; 64][..],
        &(MAX_FRAME as u32 + 1).to_le_bytes(),
        b"\x02\0\0\0\0\0\0\0{}",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let (stream, mut reader) = raw().await;
        stream.writable().await.unwrap();
        stream.try_write(bytes).unwrap();
        rustix::net::shutdown(&*stream, rustix::net::Shutdown::Write).unwrap();
        let end = env.timeout(LONG, async { reader.next::<FromHost>().await }).await.expect("it ends");
        assert!(!matches!(end, Ok(Some(_))));
    }
    {
        let (stream, mut reader) = raw().await;
        let facts = ToHost::Request {
            id: 1,
            context: read(),
            call: serde_json::json!({"call": "host_facts", "request": null}),
        };
        let fd = fs::File::open("/dev/null").unwrap().into();
        Frame::new(&facts, vec![fd]).unwrap().send(&stream).await.unwrap();
        let end = env.timeout(LONG, async { reader.next::<FromHost>().await }).await.expect("it ends");
        assert!(!matches!(end, Ok(Some(_))), "the host takes no descriptors");
    }
    let mut crowd = vec![];
    for _ in 0..40 {
        crowd.push(UnixStream::connect(&socket).await.unwrap());
    }
    drop(crowd);

    // It goes on, as the same process, and everything around it is as it was.
    agent.host_facts(&read(), ()).await.unwrap();
    agent.volume_delete(&change(5), VolumeRef { pool: pool.id, volume: volume.id }).await.unwrap();
    agent.pool_remove(&change(5), pool.id).await.unwrap();
    let check = agent.self_check(&read(), ()).await.unwrap();
    assert!(check.leaks.is_empty() && check.guests.is_empty() && check.networks.is_empty(), "{check:?}");
    assert_eq!(host_pid(), pid, "it never died");
    assert_eq!(surroundings(&karstd), before);
    assert!(!Path::new("/tmp/karst-hostile").exists() && !Path::new("/sys/class/net/khostile0").exists());
}
