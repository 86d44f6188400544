//! What is fuzzed of the libvirt front end, and what has to hold whatever comes: the same for cargo-fuzz and for the tests.
#![allow(dead_code, clippy::disallowed_methods)] // a test tool, of which each target uses a part

use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_env::RealEnv;
use karst_frontend_libvirt::{
    Front, auth,
    bounds::Clients,
    frame::{Frame, Header, KEEPALIVE, Kind, LXC, QEMU, REMOTE, Status},
    session::{self, Peer},
    table::PROCEDURES,
    transport::Transport,
    xdr::{Reader, Writer},
    xml::{
        machine::{self, Opaque, spec},
        network,
        read::{LARGEST, document},
        secret, snapshot, storage,
    },
};
use karst_model::{
    NodeId,
    access::{Grant, Principal, Role},
    instance::InstanceKind,
};
use karst_store::{SqliteStore, Store};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::OwnedReadHalf},
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};
use uuid::Uuid;

/// A connection has ended by then.
const PATIENCE: Duration = Duration::from_secs(90);
/// A call that has no answer by then goes on without being waited for.
const CALL: Duration = Duration::from_secs(2);
/// Most calls of one conversation.
pub const CALLS: usize = 16;
/// Words of procedures after which what other calls are about is not there, or does not run.
const REMOVES: [&str; 8] =
    ["UNDEFINE", "DESTROY", "DELETE", "RENAME", "SHUTDOWN", "SUSPEND", "SAVE", "CONNECT_CLOSE"];

/// The first byte of a conversation: no call changes anything.
pub const READ_ONLY: u8 = 1;
/// The connection is opened first.
pub const OPENED: u8 = 2;
/// The rest is sent as it is, not as calls.
pub const RAW: u8 = 4;
/// It is opened for containers.
pub const CONTAINERS: u8 = 8;

/// Bytes as frames: each that is one is what came, and nothing is left to a panic.
pub fn frames(bytes: &[u8]) {
    let runtime = Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (mut rest, mut at) = (bytes, 0);
        while let Ok(Some(frame)) = Frame::read(&mut rest).await {
            let encoded = frame.encode();
            assert!(bytes[at..].starts_with(&encoded), "a frame is not what came");
            at += encoded.len();
        }
    });
}

/// XML of every kind that is read. What was read and written once is read the same again.
pub fn documents(text: &str) {
    if let Ok(first) = document(text) {
        let written = first.document();
        match document(&written) {
            Ok(second) => assert_eq!(document(&second.document()), Ok(second), "{written}"),
            // Written with spaces and entities it may be longer than it was.
            Err(e) => assert!(written.len() > LARGEST, "{e:?}: {written}"),
        }
    }
    if let Ok(machine) = machine::read::machine(text) {
        let kept = Opaque::parse(&machine.opaque.document());
        let again = kept.document();
        if document(&again).is_ok() {
            assert_eq!(Opaque::parse(&again), kept, "{again}");
        }
        // Refused or not.
        let _ = spec::create(&machine);
    }
    // Each takes it or refuses it.
    let _ = network::read::network(text);
    let _ = storage::read_pool(text);
    let _ = storage::read_volume(text);
    let _ = secret::read(text);
    for disk_only in [false, true] {
        let _ = snapshot::read(text, disk_only);
    }
}

/// An engine with a simulated host, and somebody whose connection has to stay.
pub struct World {
    /// There until it is dropped.
    runtime: Option<Runtime>,
    engine: Engine,
    front: Arc<Front>,
    bystander: Mutex<Bystander>,
    objects: Objects,
}

/// Another client, who does nothing wrong.
struct Bystander {
    stream: UnixStream,
    serial: u32,
}

/// What there is, as arguments of calls have it: nothing, machine, container, pool, network, volume.
type Objects = [Vec<u8>; 6];
const NOTHING: u8 = 0;
const MACHINE: u8 = 1;
const CONTAINER: u8 = 2;
const POOL: u8 = 3;
const NETWORK: u8 = 4;
const VOLUME: u8 = 5;

fn arguments(write: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
    let mut w = Writer::new();
    write(&mut w);
    w.finish()
}

fn call(program: u32, procedure: i32, kind: Kind, serial: u32, status: Status) -> Header {
    Header { program, version: 1, procedure, kind, serial, status }
}

fn opening(uri: &str, serial: u32) -> Vec<u8> {
    let payload = arguments(|w| w.optional(Some(uri)).u32(0));
    Frame::new(call(REMOTE, 1, Kind::Call, serial, Status::Ok), payload).encode()
}

impl Bystander {
    async fn ask(&mut self, procedure: i32, payload: &[u8]) -> Vec<u8> {
        self.serial += 1;
        let header = call(REMOTE, procedure, Kind::Call, self.serial, Status::Ok);
        self.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.expect("it is read");
        let answer = timeout(PATIENCE, Frame::read(&mut self.stream)).await.expect("it is answered");
        let frame = answer.expect("a frame").expect("the connection stays");
        assert_eq!((frame.header.serial, frame.header.status), (self.serial, Status::Ok), "{procedure}");
        frame.payload.to_vec()
    }
}

fn connect(front: &Arc<Front>, read_only: bool) -> (UnixStream, tokio::task::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let mut principal = Principal::unix_admin(0, 0, 1);
    if read_only {
        principal.grants = vec![Grant { role: Role::Viewer, project: None }];
    }
    let bounds = if read_only { front.bounds.read_only } else { front.bounds.full };
    let place = Clients::new(bounds).admit(0).expect("it is the first");
    let (context, allowance) = (Context::new(principal), place.allowance.clone());
    let peer = Peer { context, read_only, stands: None, allowance };
    let front = front.clone();
    let served = async move {
        session::serve(front, peer, Transport::Unix(theirs)).await;
        drop(place);
    };
    (ours, tokio::spawn(served))
}

async fn engine() -> Engine {
    let env = RealEnv::shared();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.clone()).expect("a store"));
    let agents = Agents::default();
    let node = NodeId(Uuid::from_u128(7));
    agents.insert(node, SimulatedAgent::new(env.clone(), SimulatedOptions::default()));
    let nodes = vec![(node, "host1".into())];
    let config = EngineConfig { env, store, agents, nodes, daemon_id: "abc123".into() };
    let engine = Engine::open(config).await.expect("an engine");
    engine.bootstrap().await.expect("its first records");
    engine
}

async fn guest(engine: &Engine, name: &str, kind: InstanceKind) {
    let request = CreateInstance {
        name: Some(name.into()),
        kind,
        description: String::new(),
        ephemeral: false,
        config: Default::default(),
        devices: Default::default(),
        profiles: None,
        source: InstanceSource::None,
        start: true,
        target: None,
        vmid: None,
    };
    let admin = Context::new(Principal::system());
    let (_, operation) = engine.instance_create(&admin, "default", request).await.expect("a guest");
    assert_eq!(operation.ended().await.error, None);
}

impl World {
    /// With a machine, a container and a volume.
    pub fn start() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        let (engine, front, bystander, objects) = runtime.block_on(async {
            let engine = engine().await;
            guest(&engine, "v1", InstanceKind::VirtualMachine).await;
            guest(&engine, "c1", InstanceKind::Container).await;
            let front = Front::new(engine.clone());
            // Containers are of another connection.
            let mut other = Bystander { stream: connect(&front, false).0, serial: 0 };
            other.ask(1, &arguments(|w| w.optional(Some("lxc:///system")).u32(0))).await;
            let named = |name: &str| arguments(|w| w.string(name));
            let container = other.ask(23, &named("c1")).await;
            let mut bystander = Bystander { stream: connect(&front, false).0, serial: 0 };
            bystander.ask(1, &arguments(|w| w.optional(Some("qemu:///system")).u32(0))).await;
            let machine = bystander.ask(23, &named("v1")).await;
            let pool = bystander.ask(84, &named("default")).await;
            let network = bystander.ask(46, &named("karstbr0")).await;
            let text = "<volume><name>d1</name><capacity unit='MiB'>1</capacity></volume>";
            let new = [pool.clone(), arguments(|w| w.string(text).u32(0))].concat();
            let volume = bystander.ask(93, &new).await;
            (engine, front, bystander, [vec![], machine, container, pool, network, volume])
        });
        Self { runtime: Some(runtime), engine, front, bystander: Mutex::new(bystander), objects }
    }

    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("it is there").block_on(work)
    }

    /// What a client says before it is somebody: it becomes nobody by it.
    pub fn login(&self, bytes: &[u8]) {
        self.block_on(async {
            let (mut client, mut server) = tokio::io::duplex(1 << 20);
            client.write_all(&bytes[..bytes.len().min(1 << 19)]).await.expect("there is room");
            client.shutdown().await.expect("it is there");
            let login = auth::negotiate(&self.engine, &mut server, "192.0.2.1:16514");
            let became = timeout(PATIENCE, login).await.expect("it ends");
            assert!(!matches!(became, Ok(Some(_))), "somebody without a password is somebody");
        });
    }

    /// A connection: its first byte says how it is made, the rest is calls ([`step`]). It ends, and another one stays.
    pub fn converse(&self, input: &[u8]) {
        let Some((flags, rest)) = input.split_first() else { return };
        self.block_on(self.conversation(*flags, rest));
        let mut bystander = self.bystander.lock().unwrap_or_else(|e| e.into_inner());
        // Its own version, and its list of domains.
        self.block_on(async {
            assert_eq!(bystander.ask(157, &[]).await.len(), 8);
            let listed = bystander.ask(273, &arguments(|w| w.i32(1).u32(0))).await;
            assert!(listed.len() >= 8);
        });
    }

    async fn conversation(&self, flags: u8, rest: &[u8]) {
        let (stream, served) = connect(&self.front, flags & READ_ONLY != 0);
        let (read, mut write) = stream.into_split();
        let (told, mut answers) = mpsc::unbounded_channel();
        let reading = tokio::spawn(answers_of(read, told));
        let mut steps = vec![];
        if flags & OPENED != 0 {
            let uri = if flags & CONTAINERS != 0 { "lxc:///system" } else { "qemu:///system" };
            steps.push((opening(uri, u32::MAX), Some(u32::MAX)));
        }
        match flags & RAW {
            0 => steps.extend(calls(rest, &self.objects)),
            _ => steps.push((rest.to_vec(), None)),
        }
        for (bytes, awaited) in steps {
            if write.write_all(&bytes).await.is_err() {
                break; // it was ended, as what is malformed ends it
            }
            let answered = async {
                while let Some(serial) = answers.recv().await {
                    if Some(serial) == awaited {
                        break;
                    }
                }
            };
            if awaited.is_some() {
                // What takes longer goes on by itself.
                let _ = timeout(CALL, answered).await;
            }
        }
        drop(write);
        timeout(PATIENCE, served).await.expect("the connection ends").expect("and not by a panic");
        timeout(PATIENCE, reading).await.expect("so do its answers").expect("which are frames");
    }
}

/// Conversations that reach each procedure with arguments that fit many of them: those after which what there was is there
/// still, and the others.
pub fn seeds() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let zeros: &[u8] = &[0; 8];
    let text = arguments(|w| w.string("text").u32(0));
    let typed = arguments(|w| w.u32(1).string("vcpu_quota").u32(3).i64(1000).u32(0));
    let tails: [&[u8]; 6] = [&[], &zeros[..4], zeros, &[0, 0, 0, 1], &text, &typed];
    let list = call(REMOTE, 273, Kind::Call, 2, Status::Ok);
    let list = Frame::new(list, arguments(|w| w.i32(1).u32(0))).encode();
    let (mut stay, mut remove) = (vec![], vec![]);
    stay.push([&[RAW][..], &opening("qemu:///system?project=default", 1), &list].concat());
    stay.push([&[OPENED | RAW][..], &list, &list].concat());
    for (n, p) in PROCEDURES.iter().enumerate() {
        let object = match p.name {
            // By turns: most are for both kinds.
            name if name.starts_with("DOMAIN_") && n % 8 == 0 => CONTAINER,
            name if name.starts_with("DOMAIN_") => MACHINE,
            name if name.starts_with("NETWORK_") => NETWORK,
            name if name.starts_with("STORAGE_POOL_") => POOL,
            name if name.starts_with("STORAGE_VOL_") => VOLUME,
            _ => NOTHING,
        };
        let flags = if object == CONTAINER { OPENED | CONTAINERS } else { OPENED };
        let removes = REMOVES.iter().any(|word| p.name.contains(word));
        let to = if removes { &mut remove } else { &mut stay };
        for tail in tails {
            to.push([&[flags][..], &step(0, object, p.number, tail)].concat());
        }
    }
    for xml in DOCUMENTS {
        let payload = arguments(|w| w.string(xml).u32(0));
        for number in [10, 350, 40, 41, 78, 142] {
            stay.push([&[OPENED][..], &step(0, NOTHING, number, &payload)].concat());
        }
        stay.push([&[OPENED][..], &step(0, POOL, 93, &payload)].concat());
        stay.push([&[OPENED][..], &step(0, MACHINE, 185, &payload)].concat());
    }
    // What QEMU and its agent are told, the program of containers, keepalive, streams; and a descriptor that does not come,
    // which ends the connection.
    let command = arguments(|w| w.string("{\"execute\":\"query-status\"}").u32(0));
    for (selector, number) in [(5, 1), (5, 3), (6, 1), (7, 1), (16, 201), (40, 208), (8, 343)] {
        stay.push([&[OPENED][..], &step(selector, MACHINE, number, &command)].concat());
    }
    (stay, remove)
}

impl Drop for World {
    fn drop(&mut self) {
        self.engine.close();
        // Whatever still waits for a guest or a disk is not waited for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One call of a conversation: what it is, the object that its arguments begin with, its procedure, how long the rest of them is,
/// and that.
pub fn step(selector: u8, object: u8, procedure: i32, payload: &[u8]) -> Vec<u8> {
    let mut all = vec![selector, object];
    all.extend((procedure as u16).to_be_bytes());
    all.extend((payload.len() as u16).to_be_bytes());
    all.extend(payload);
    all
}

/// Frames out of [`step`]s, each with the serial of the answer that is waited for.
fn calls(mut rest: &[u8], objects: &Objects) -> Vec<(Vec<u8>, Option<u32>)> {
    let mut all = vec![];
    while let Some(([selector, object, a, b, c, d], more)) = rest.split_first_chunk()
        && all.len() < CALLS
    {
        let length = usize::from(u16::from_be_bytes([*c, *d])).min(more.len());
        let (payload, left) = more.split_at(length);
        let payload = [objects[usize::from(*object) % objects.len()].as_slice(), payload].concat();
        rest = left;
        let program = match selector & 7 {
            5 => QEMU,
            6 => LXC,
            7 => KEEPALIVE,
            _ => REMOTE,
        };
        let (kind, status) = match selector >> 3 & 7 {
            1 => (Kind::CallWithFds, Status::Ok),
            2 => (Kind::Stream, Status::Continue),
            3 => (Kind::Stream, Status::Ok),
            4 => (Kind::Stream, Status::Error),
            5 => (Kind::StreamHole, Status::Continue),
            6 => (Kind::Message, Status::Ok),
            _ => (Kind::Call, Status::Ok),
        };
        // A stream has the number of the call that opened it.
        let serial = if matches!(kind, Kind::Stream | Kind::StreamHole) { all.len() } else { all.len() + 1 };
        let procedure = i32::from(i16::from_be_bytes([*a, *b]));
        let header = call(program, procedure, kind, serial as u32, status);
        let awaited = (kind == Kind::Call && program != KEEPALIVE).then_some(serial as u32);
        all.push((Frame::new(header, payload).encode(), awaited));
    }
    all
}

/// Takes answers until there are no more, and tells their serials. What a server sends is frames.
async fn answers_of(mut read: OwnedReadHalf, told: mpsc::UnboundedSender<u32>) {
    loop {
        match Frame::read(&mut read).await {
            Ok(Some(frame)) => {
                if frame.header.kind == Kind::ReplyWithFds {
                    // Each descriptor follows with a byte of its own.
                    let count = Reader::new(&frame.payload).u32().expect("their number") as usize;
                    assert!((1..=karst_frontend_libvirt::fds::MOST).contains(&count));
                    if read.read_exact(&mut vec![0; count]).await.is_err() {
                        return;
                    }
                }
                // Whoever waited may have gone on.
                let _ = told.send(frame.header.serial);
            }
            Ok(None) => return,
            Err(e) => {
                let ended = matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset);
                return assert!(ended, "a server sends what is no frame: {e}");
            }
        }
    }
}

/// Documents with something of everything that is read, and a domain that can be defined.
pub const DOCUMENTS: [&str; 7] = [
    "<domain type='qemu'><name>f0</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type machine='q35'>hvm</type></os>\
     <devices><disk type='volume'><source pool='default' volume='d1'/><target dev='vda' bus='virtio'/></disk>\
     <interface type='network'><source network='karstbr0'/></interface></devices></domain>",
    "<domain type='qemu' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>f1</name>\
     <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><title>A &amp; b</title><description>Some &lt;text&gt;</description>\
     <metadata><app:a xmlns:app='http://example.org/app'><app:b c='d'>e</app:b></app:a></metadata>\
     <memory unit='MiB'>256</memory><currentMemory unit='KiB'>131072</currentMemory>\
     <vcpu placement='static' cpuset='0-1' current='2'>4</vcpu><cputune><shares>2048</shares></cputune>\
     <os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><boot dev='cdrom'/><boot dev='hd'/>\
     <bootmenu enable='yes'/><kernel>/karst/default/k</kernel><cmdline>a=b</cmdline></os><features><acpi/></features>\
     <cpu mode='custom'><model>qemu64</model><feature policy='disable' name='lm'/></cpu><clock offset='utc'/>\
     <on_reboot>destroy</on_reboot><on_crash>restart</on_crash><devices>\
     <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/karst/default/d1'/>\
     <target dev='vda' bus='virtio'/><boot order='1'/><alias name='ua-x'/>\
     <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/></disk>\
     <disk type='volume' device='cdrom'><source pool='default' volume='d2'/><target dev='sdc' bus='sata'/></disk>\
     <interface type='network'><mac address='52:54:00:11:22:33'/><source network='karstbr0'/><model type='e1000e'/>\
     <filterref filter='clean-traffic'/><bandwidth><inbound average='1000'/></bandwidth><mtu size='1400'/></interface>\
     <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>\
     <graphics type='vnc' passwd='secret' passwdValidTo='2031-01-31T12:00:00'/><graphics type='spice'/>\
     <video><model type='virtio' heads='1'/></video></devices></domain>",
    "<network><name>f2</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1810</uuid><forward mode='nat'/>\
     <bridge name='f2' stp='on' delay='0'/><mtu size='1400'/><domain name='example.org'/>\
     <ip address='10.77.0.1' netmask='255.255.255.0'><dhcp><range start='10.77.0.10' end='10.77.0.90'/>\
     <host mac='52:54:00:11:22:34' name='a' ip='10.77.0.5'/></dhcp></ip>\
     <ip family='ipv6' address='fd00:77::1' prefix='64'/></network>",
    "<pool type='dir'><name>f3</name></pool>",
    "<volume type='file'><name>f4</name><capacity unit='GiB'>1</capacity><allocation>0</allocation>\
     <target><format type='qcow2'/></target></volume>",
    "<secret ephemeral='no' private='yes'><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1812</uuid><description>d</description>\
     <usage type='ceph'><name>client.admin secret</name></usage></secret>",
    "<domainsnapshot><name>s1</name><description>d</description><memory snapshot='no'/>\
     <disks><disk name='vda' snapshot='internal'/></disks></domainsnapshot>",
];
