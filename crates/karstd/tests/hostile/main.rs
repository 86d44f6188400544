//! A control process that turned against its host: it has the socket and control's user, and tries what the wire allows:
//! every call of the protocol, with what it must not be given. The host survives, and nothing outside its own objects
//! changes. The test has namespaces of its own, so that every link, mount, rule and file that changes is the host's doing.
#![allow(clippy::disallowed_methods)] // real processes, real time

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod attempts;

use attempts::{Comes, NO_ARGUMENT, attempts, guest};
use karst_agent::{
    Call, CallContext, Client, Fence, FileRef, FileWriteRequest, HostAgent, NetworkChoose, StreamFormat,
    VolumeImport, VolumeRef, VolumeResize,
    wire::{Frame, FrameReader, FromHost, MAX_FRAME, Outcome, ToHost},
};
use karst_env::{EnvExt, RealEnv};
use karst_model::{
    ByteSize, Error, ErrorKind, NetworkId, NodeId, PoolId, SagaId, VolumeId,
    guest::{FileKind, FileWrite},
    instance::InstanceKind,
    network::BridgeSpec,
    spec::*,
    storage::VolumeContent,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

const LONG: Duration = Duration::from_secs(60);
/// Says that the namespaces are there.
const OWN: &str = "KARST_TEST_OWN_NAMESPACES";
/// What a file of the host says that no guest and no control process may read or change.
const SECRET: &str = "the host's own";
/// Every way to say no. What is missing is [`ErrorKind::Internal`] and [`ErrorKind::Timeout`]: a host that stumbles over a
/// request has not refused it.
const REFUSALS: &[ErrorKind] = &[
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Unsupported,
    ErrorKind::Forbidden,
    ErrorKind::TooLarge,
    ErrorKind::Quota,
];

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
    base: PathBuf,
    dir: PathBuf,
    _base: tempfile::TempDir,
}

/// A bridge of somebody else on this machine.
const FOREIGN: &str = "khforeign0";

impl Drop for Karstd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Guests, control groups and id ranges of a test that failed half-way.
        let _ = Command::new(env!("CARGO_BIN_EXE_karstd")).arg("purge").arg("--dir").arg(&self.dir).output();
    }
}

/// Runs the test of this name again in a network and a mount namespace of its own. True there; false where it only waited
/// for that.
fn in_own_namespaces(name: &str) -> bool {
    if !backends::root() {
        return false;
    }
    if std::env::var_os(OWN).is_none() {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount"]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture"]).env(OWN, "1");
        assert!(command.status().unwrap().success(), "in namespaces of its own");
        return false;
    }
    // /sys of this network; control groups stay where they are; an /etc that nobody else writes.
    let script = "set -e; d=$(mktemp -d); mount --rbind /sys/fs/cgroup $d; mount -t sysfs sysfs /sys
        mount --rbind $d /sys/fs/cgroup; umount -l $d
        mount -t tmpfs -o mode=755 etc $d; cp -a /etc/. $d; mount --move $d /etc; rmdir $d; ip link set lo up";
    assert!(Command::new("sh").args(["-c", script]).status().unwrap().success());
    true
}

fn start() -> Karstd {
    let keeper = Path::new(env!("CARGO_BIN_EXE_karstd")).with_file_name("karst-keeper");
    if !keeper.exists() {
        // A test of one package builds no other's programs.
        let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "karst-keeper"]).status().unwrap();
        assert!(built.success());
    }
    let base = tempfile::Builder::new().prefix("karstd-h").tempdir_in("/var/tmp").unwrap();
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
    fs::write(base.path().join("canary"), SECRET).unwrap();
    let made = Command::new("ip").args(["link", "add", FOREIGN, "type", "bridge"]).status().unwrap();
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
    Karstd { child, base: base.path().to_owned(), dir, _base: base }
}

fn said(program: &str, args: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|l| format!("{program}: {l}")).collect()
}

/// Every file below, with what would show that it was touched.
fn tree(at: &Path, but: &Path, into: &mut BTreeSet<String>) {
    for entry in fs::read_dir(at).unwrap().flatten() {
        let path = entry.path();
        if path == but {
            continue;
        }
        let m = fs::symlink_metadata(&path).unwrap();
        into.insert(format!(
            "{} {:o} {}:{} {} bytes, changed {}.{}",
            path.display(),
            m.mode(),
            m.uid(),
            m.gid(),
            m.size(),
            m.ctime(),
            m.ctime_nsec()
        ));
        if m.is_dir() {
            tree(&path, but, into);
        }
    }
}

/// Everything on the machine that it might have changed: links, addresses, routes, rules, mounts, the kernel's settings
/// of the network, all of /etc, and all that lies beside DIR.
fn surroundings(karstd: &Karstd) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for args in [&["-o", "link"][..], &["-o", "addr"], &["route"], &["-6", "route"], &["rule"], &["netns"]] {
        all.extend(said("ip", args));
    }
    all.extend(said("nft", &["list", "ruleset"]));
    // Id, parent and device of a mount say nothing; root, place, options and kind do.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    all.extend(mounts.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap().to_owned()));
    for key in
        ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "kernel/hostname", "kernel/core_pattern"]
    {
        let value = fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap_or_default();
        all.insert(format!("{key} = {value}"));
    }
    tree(Path::new("/etc"), Path::new("/"), &mut all);
    tree(&karstd.base, &karstd.dir, &mut all);
    all.insert(fs::read_to_string(karstd.base.join("canary")).unwrap());
    let traces =
        ["/tmp", "/run", "/", "/root", "/var/tmp"].iter().flat_map(|d| fs::read_dir(d).unwrap().flatten());
    let names = traces.map(|e| e.path().to_string_lossy().into_owned());
    all.extend(names.filter(|n| n.contains("hostile")));
    all
}

/// A connection that sends what it likes.
struct Raw {
    stream: Arc<UnixStream>,
    reader: FrameReader,
    id: u64,
}

impl Raw {
    async fn connect(socket: &Path) -> Self {
        let stream = Arc::new(UnixStream::connect(socket).await.unwrap());
        let hello = ToHost::Hello { versions: (1, 1), executor: None };
        Frame::new(&hello, vec![]).unwrap().send(&stream).await.unwrap();
        let mut reader = FrameReader::new(stream.clone(), true);
        reader.next::<FromHost>().await.unwrap().unwrap();
        Self { stream, reader, id: 0 }
    }

    async fn ask(
        &mut self,
        context: CallContext,
        call: &str,
        request: &Value,
    ) -> Result<(Value, Vec<OwnedFd>), Error> {
        self.id += 1;
        let call = json!({"call": call, "request": request});
        let request = ToHost::Request { id: self.id, context, call };
        Frame::new(&request, vec![]).unwrap().send(&self.stream).await.unwrap();
        let (answer, fds) = self.reader.next::<FromHost>().await.unwrap().expect("answered, not cut off");
        match answer {
            FromHost::Response { id, outcome: Outcome::Result(value) } if id == self.id => {
                Ok((serde_json::from_str(value.get()).unwrap(), fds))
            }
            FromHost::Response { id, outcome: Outcome::Error(error) } if id == self.id => Err(error),
            other => panic!("{other:?}"),
        }
    }
}

fn pool() -> PoolId {
    PoolId(id(2))
}

/// A volume of the pool: 3 is the root of the container that runs, 13 a disk, 23 a tree that nobody uses, 99 is not there.
fn volume(n: u128) -> VolumeRef {
    VolumeRef { pool: pool(), volume: VolumeId(id(n)) }
}

fn file(instance: u128, root: u128, path: &str) -> FileRef {
    let kind = InstanceKind::Container;
    FileRef { instance: id(instance).into(), kind, root: volume(root), path: path.into() }
}

fn write(path: &str, kind: FileKind, append: bool, target: Option<&str>) -> FileWrite {
    let target = target.map(str::to_owned);
    FileWrite { path: path.into(), kind, uid: None, gid: None, mode: Some(0o755), append, target }
}

/// Writes a file, to its end.
async fn written(
    agent: &dyn HostAgent,
    file: FileRef,
    write: FileWrite,
    content: Vec<u8>,
) -> karst_model::Result<()> {
    let answer = agent.file_write(&read(), FileWriteRequest { file, write }).await?;
    let Some(session) = answer.value else { return Ok(()) };
    let mut pipe = fs::File::from(answer.fds.into_iter().next().unwrap());
    // A broken pipe is the host's refusal, which the session's end says in words.
    let _ = tokio::task::spawn_blocking(move || pipe.write_all(&content)).await.unwrap();
    agent.session_wait(&read(), session).await.map(drop)
}

/// A tar archive of one member.
fn archive(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", content.len()).as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut archive = header.to_vec();
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive
}

/// Links in a volume that lead out of it: what is read, written, made or deleted by their way stays inside or is refused.
async fn links_lead_nowhere(agent: &dyn HostAgent, karstd: &Karstd, instance: u128, root: u128) {
    let base = karstd.base.to_str().unwrap();
    let up = "../".repeat(12);
    let canary = format!("{base}/canary");
    let before = surroundings(karstd);
    for (link, target, rest) in [
        ("/absolute", canary.clone(), ""),
        ("/absolute", base.to_owned(), "/canary"),
        ("/absolute", base.to_owned(), "/fresh"),
        ("/relative", format!("{up}{}", &canary[1..]), ""),
        ("/relative", format!("{up}{}", &base[1..]), "/canary"),
        ("/relative", format!("{up}{}", &base[1..]), "/fresh"),
        ("/dotted", "..".to_owned(), "/canary"),
        ("/magic", format!("/proc/self/root{canary}"), ""),
        ("/magic", format!("/proc/self/root{base}"), "/canary"),
        ("/magic", format!("/proc/self/root{base}"), "/fresh"),
        ("/magic", "/proc/self/cwd".to_owned(), "/canary"),
        ("/magic", "/proc/self/fd".to_owned(), "/3"),
        ("/magic", "/dev/fd".to_owned(), "/0"),
    ] {
        let path = format!("{link}{rest}");
        let what = format!("{path:?} by {target:?} in {instance}");
        let make = async || {
            // It may be a file by now.
            let _ = agent.file_delete(&read(), file(instance, root, link)).await;
            let link_to = write(link, FileKind::Symlink, false, Some(&target));
            written(agent, file(instance, root, link), link_to, vec![])
                .await
                .unwrap_or_else(|e| panic!("{what}: {e:?}"));
        };
        make().await;
        if let Ok(opened) = agent.file_open(&read(), file(instance, root, &path)).await {
            for fd in opened.fds {
                let mut text = String::new();
                let mut content = fs::File::from(fd);
                // What cannot be read gives nothing away.
                let _ = content.read_to_string(&mut text);
                assert!(!text.contains(SECRET), "{what} was read");
                drop(content.write_all(b"overwritten"));
            }
        }
        for append in [false, true] {
            make().await;
            let over = write(&path, FileKind::File, append, None);
            let _ = written(agent, file(instance, root, &path), over, b"overwritten".to_vec()).await;
        }
        for kind in [FileKind::Directory, FileKind::Symlink] {
            make().await;
            let over = write(&path, kind, false, (kind == FileKind::Symlink).then_some("x"));
            let _ = written(agent, file(instance, root, &path), over, vec![]).await;
        }
        make().await;
        let _ = agent.file_delete(&read(), file(instance, root, &path)).await;
        assert_eq!(fs::read_to_string(&canary).ok().as_deref(), Some(SECRET), "{what}");
        let _ = agent.file_delete(&read(), file(instance, root, link)).await;
    }
    assert_eq!(surroundings(karstd), before, "by links in {instance}");
}

#[test]
fn a_hostile_control_process() {
    if in_own_namespaces("a_hostile_control_process") {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(hostile());
    }
}

async fn hostile() {
    let karstd = start();
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
    let host_pid = || {
        let text = fs::read(karstd.dir.join("run/daemons.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["daemons"]["host"]["pid"].clone()
    };
    let pid = host_pid();
    let before = surroundings(&karstd);

    // What it may have: a pool, two trees, a disk, and a container that runs.
    agent.pool_ensure(&change(5), PoolSpec::own(pool(), karst_model::storage::PoolKind::Dir)).await.unwrap();
    for (n, content, size) in [
        (3, VolumeContent::Filesystem, None),
        (13, VolumeContent::Block, Some(ByteSize::mib(1))),
        (23, VolumeContent::Filesystem, None),
    ] {
        let spec =
            VolumeSpec { id: VolumeId(id(n)), pool: pool(), content, size, source: VolumeSource::Empty };
        agent.volume_create(&change(5), spec).await.unwrap();
    }
    for place in ["/sbin", "/proc", "/sys", "/dev", "/run", "/tmp", "/etc"] {
        let directory = write(place, FileKind::Directory, false, None);
        written(&agent, file(4, 3, place), directory, vec![]).await.unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|p| fs::read(p).ok());
    let busybox = busybox.expect("busybox is installed (scripts/install-dependencies)");
    let init = write("/sbin/init", FileKind::File, false, None);
    written(&agent, file(4, 3, "/sbin/init"), init, busybox).await.unwrap();
    let spec: GuestSpec = serde_json::from_value(guest(4, |_| {})).unwrap();
    agent.guest_start(&change(5), spec).await.unwrap();
    let running = surroundings(&karstd);

    // Every call of the protocol, with what it must not be given.
    let attempts = attempts(&karstd);
    let tried: BTreeSet<&str> = attempts.iter().map(|a| a.0).chain(NO_ARGUMENT.iter().copied()).collect();
    let untried: Vec<_> = Call::NAMES.iter().filter(|n| !tried.contains(*n)).collect();
    assert!(untried.is_empty(), "calls without a hostile case: {untried:?}");
    let mut raw = Raw::connect(&socket).await;
    let mut wrong = vec![];
    for (call, what, request, comes) in &attempts {
        let parsed = serde_json::from_value::<Call>(json!({"call": call, "request": request}));
        let mutation = parsed.as_ref().is_ok_and(Call::is_mutation);
        if mutation {
            // Of an executor that was succeeded, and of none.
            for context in [change(4), read()] {
                match raw.ask(context, call, request).await {
                    Err(e) if e.kind == ErrorKind::Conflict => {}
                    other => wrong.push(format!("{call}, {what}, with a lower epoch or none: {other:?}")),
                }
            }
        }
        let context = if mutation { change(5) } else { read() };
        match (raw.ask(context, call, request).await, comes) {
            (Err(e), Comes::Refused) if REFUSALS.contains(&e.kind) => {
                if e.message.is_empty() || e.message.contains('\n') {
                    wrong.push(format!("{call}, {what}: refused without words: {e:?}"));
                }
            }
            (Ok(_), Comes::Nothing(_)) => {}
            (other, _) => wrong.push(format!("{call}, {what}: {other:?}, not {comes:?}")),
        }
    }
    for call in Call::NAMES {
        // By this name it is on the wire, and it takes nothing of this kind.
        for request in
            [json!({"path": "/etc/shadow"}), json!(["/etc/shadow"]), json!("/etc/shadow"), json!(-1)]
        {
            // A link may have any name; and whoever names no source asks for the pools that the host has.
            if *call == "link_state" && request.is_string() || *call == "pools_find" && request.is_object() {
                continue;
            }
            // A path is what this one takes; that it is not granted is tried with the rest.
            if *call == "memory_file_read" && request.is_string() {
                continue;
            }
            match raw.ask(read(), call, &request).await {
                Err(e) if e.kind == ErrorKind::Unsupported => {
                    let parsed = serde_json::from_value::<Call>(json!({"call": call, "request": request}));
                    let unknown = format!("unknown variant `{call}`");
                    let known = !parsed.expect_err("it is refused").to_string().contains(&unknown);
                    assert!(known, "{call} has another name on the wire");
                }
                other => wrong.push(format!("{call} of {request}: {other:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let observed = agent.guest_observe_all(&read(), ()).await.unwrap();
    assert!(
        matches!(&observed[..], [one] if one.state == karst_model::instance::RuntimeState::Running),
        "{observed:?}"
    );
    let kept = agent.self_check(&read(), ()).await.unwrap();
    assert_eq!(
        (kept.volumes.len(), kept.images.len(), kept.backups.len(), kept.sessions),
        (3, 0, 0, 0),
        "{kept:?}"
    );
    assert!(kept.leaks.is_empty(), "{kept:?}");
    let verdict = agent.audit_verify(&read(), ()).await.unwrap();
    assert_eq!((verdict.checked, verdict.fault), (1, None));
    assert_eq!(surroundings(&karstd), running, "after every call");

    // Networks with what would become lines of dnsmasq's configuration and rules of nft.
    let refused = |outcome: karst_model::Result<()>, kinds: &[ErrorKind]| {
        let e = outcome.expect_err("it was to be refused");
        assert!(kinds.contains(&e.kind), "{e:?}");
    };
    let network = |bridge: &str| NetworkSpec {
        id: NetworkId(id(1)),
        bridge: bridge.into(),
        spec: BridgeSpec { ipv4: Some("10.213.77.1/24".parse().unwrap()), nat: true, ..Default::default() },
        hosts: vec![],
        acls: vec![],
        sets: vec![],
        forwards: vec![],
        owner: None,
    };
    let taken = [ErrorKind::Conflict, ErrorKind::Invalid];
    refused(agent.network_ensure(&change(5), network(FOREIGN)).await, &taken);
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
    let forbidden = [ErrorKind::Forbidden];
    let mut evil = network("khostile0");
    evil.spec.external_interfaces = vec![FOREIGN.into()];
    refused(agent.network_ensure(&change(5), evil).await, &forbidden);
    let mut evil = network("khostile0");
    let port = PortSpec { interface: FOREIGN.into(), mac_filter: true, ..Default::default() };
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
    assert_eq!(surroundings(&karstd), running, "after networks");

    // Links, in a tree of a container that never ran and in one that runs.
    links_lead_nowhere(&agent, &karstd, 24, 23).await;
    links_lead_nowhere(&agent, &karstd, 4, 3).await;

    // Archives that reach out of the volume that they fill; then a whole one, to see that the way is the right one.
    let canary = karstd.base.join("canary").to_str().unwrap().to_owned();
    let up = format!("{}{}", "../".repeat(12), &canary[1..]);
    let linked = |target: &str| {
        let mut both = archive("l", b'2', target, b"");
        both.extend(archive("l/canary", b'0', "", b"overwritten"));
        both
    };
    for (what, stream) in [
        ("a name upwards", archive(&up, b'0', "", b"overwritten")),
        ("an absolute name", archive(&canary, b'0', "", b"overwritten")),
        ("through a link", linked(karstd.base.to_str().unwrap())),
        ("through a link upwards", linked(up.trim_end_matches("/canary"))),
        ("a hard link upwards", archive("h", b'1', &up, b"")),
        ("a hard link", archive("h", b'1', &canary, b"")),
        ("a device", archive("d", b'4', "", b"")),
        ("no archive", b"overwritten".repeat(100)),
        ("a whole one", archive("whole", b'0', "", b"content")),
    ] {
        let request = VolumeImport { volume: volume(23), format: StreamFormat::Tar };
        let mut stream = stream;
        stream.extend([0; 1024]);
        let answer = agent.volume_import(&change(5), request).await.unwrap();
        let mut pipe = fs::File::from(answer.fds.into_iter().next().unwrap());
        let _ = tokio::task::spawn_blocking(move || pipe.write_all(&stream)).await.unwrap();
        let ended = agent.session_wait(&read(), answer.value).await;
        agent.session_close(&read(), answer.value).await.unwrap();
        match what {
            "a whole one" => assert_eq!(ended.unwrap(), 0),
            // Inside, where such a name leads when its root is the volume's, it may be made; outside never.
            _ => drop(ended.map_err(|e| assert!(REFUSALS.contains(&e.kind), "{what}: {e:?}"))),
        }
        assert_eq!(fs::read_to_string(&canary).unwrap(), SECRET, "{what}");
    }
    let whole = agent.file_open(&read(), file(24, 23, "/whole")).await.unwrap();
    assert_eq!(whole.value.info.size, 7);
    drop(whole);

    // What is to be uploaded is written, not read.
    for (call, request) in
        [("backup_stage", json!(id(41))), ("image_stage", json!({"image": id(42), "part": "unified"}))]
    {
        let (_, fds) = raw.ask(change(5), call, &request).await.unwrap();
        for fd in fds {
            let mode = rustix::fs::fcntl_getfl(&fd).unwrap() & rustix::fs::OFlags::ACCMODE;
            assert_eq!(mode, rustix::fs::OFlags::WRONLY, "{call}");
        }
    }
    raw.ask(change(5), "backup_delete", &json!(id(41))).await.unwrap();
    raw.ask(change(5), "image_delete", &json!(id(42))).await.unwrap();

    // What a connection held ends with it: a volume that it kept open is free for who comes next.
    for (call, request) in [
        ("volume_open", json!(volume(13))),
        ("volume_import", json!({"volume": volume(13), "format": "raw"})),
        ("volume_export", json!({"volume": volume(13), "snapshot": null, "format": "raw"})),
    ] {
        let mut holding = Raw::connect(&socket).await;
        let context = if call == "volume_import" { change(5) } else { read() };
        let (_, fds) = holding.ask(context, call, &request).await.unwrap();
        assert_eq!(fds.len(), 1, "{call}");
        // The descriptor outlives the connection: not its end is what frees the volume.
        drop(holding);
        let larger = VolumeResize { volume: volume(13), size: ByteSize::mib(2) };
        agent.volume_resize(&change(5), larger).await.unwrap_or_else(|e| panic!("after {call}: {e:?}"));
        assert_eq!(agent.self_check(&read(), ()).await.unwrap().sessions, 0, "{call}");
        drop(fds);
    }

    // Raw frames: unknown calls, garbage, huge, descriptors, and many connections.
    for call in ["shell", "mount", "run", "", "Call"] {
        let mut raw = Raw::connect(&socket).await;
        let refused = raw.ask(read(), call, &json!({"path": "/etc/shadow"})).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unsupported, "{call}");
    }
    for bytes in [
        &[0xff; 64][..],
        &(MAX_FRAME as u32 + 1).to_le_bytes(),
        b"\x02\0\0\0\0\0\0\0{}",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let Raw { stream, mut reader, .. } = Raw::connect(&socket).await;
        stream.writable().await.unwrap();
        stream.try_write(bytes).unwrap();
        rustix::net::shutdown(&*stream, rustix::net::Shutdown::Write).unwrap();
        let end = env.timeout(LONG, async { reader.next::<FromHost>().await }).await.expect("it ends");
        assert!(!matches!(end, Ok(Some(_))));
    }
    {
        let Raw { stream, mut reader, .. } = Raw::connect(&socket).await;
        let facts =
            ToHost::Request { id: 1, context: read(), call: json!({"call": "host_facts", "request": null}) };
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

    // It goes on, as the same process; what it was given goes; and everything around it is as it was.
    agent.host_facts(&read(), ()).await.unwrap();
    let stop = json!({"guest": {"instance": id(4), "generation": {"incarnation": 1, "n": 1}}, "mode": {"kind": "force"}});
    agent.guest_stop(&change(5), serde_json::from_value(stop).unwrap()).await.unwrap();
    agent.guest_destroy(&change(5), id(4).into()).await.unwrap();
    for n in [3, 13, 23] {
        agent.volume_delete(&change(5), volume(n)).await.unwrap();
    }
    agent.pool_remove(&change(5), pool()).await.unwrap();
    let check = agent.self_check(&read(), ()).await.unwrap();
    assert_eq!(check, Default::default(), "nothing is left");
    assert_eq!(host_pid(), pid, "it never died");
    assert_eq!(surroundings(&karstd), before);
}
