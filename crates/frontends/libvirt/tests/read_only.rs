//! What is denied to who only sees: by the read-only socket, compared with libvirt's own list, and by the engine to a
//! principal who may not change anything, whatever his socket.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Refused, Server, argument};
use karst_engine::{Context, volumes::create::CreateVolume};
use karst_frontend_libvirt::{
    bounds::{Bounds, Clients},
    error::Code,
    frame::{Frame, Header, Kind, QEMU, REMOTE, Status},
    names::NAMES,
    session::{self, Peer},
    table,
    transport::Transport,
    xdr::Reader,
};
use karst_model::{
    Config,
    access::{Grant, Principal, Role},
    instance::InstanceKind,
    storage::VolumeContent,
};
use std::collections::BTreeMap;
use tokio::{io::AsyncWriteExt, net::UnixStream};

const DENIED: &str = include_str!("read-only-denied.txt");

/// Names by number, and whether that depends on the arguments.
fn denied(program: &str) -> BTreeMap<i32, (&'static str, bool)> {
    let lines = DENIED.lines().filter(|line| !line.starts_with('#'));
    let words = lines.map(|line| line.split(' ').collect::<Vec<_>>()).filter(|words| words[0] == program);
    words.map(|words| (words[1].parse().unwrap(), (words[2], words.len() > 3))).collect()
}

fn number(name: &str) -> i32 {
    NAMES.iter().position(|n| *n == name).unwrap() as i32 + 1
}

/// A call of the QEMU program.
async fn qemu(client: &mut Client, procedure: i32, payload: &[u8]) -> Result<(), i32> {
    client.serial += 1;
    let serial = client.serial;
    let header =
        Header { program: QEMU, version: 1, procedure, kind: Kind::Call, serial, status: Status::Ok };
    client.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.unwrap();
    let frame = client.receive().await;
    assert_eq!((frame.header.program, frame.header.serial), (QEMU, serial));
    match frame.header.status {
        Status::Ok => Ok(()),
        _ => Err(Reader::new(&frame.payload).i32().unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_libvirt_denies_to_readers_is_denied() {
    let (remote, special) = (denied("remote"), denied("qemu"));
    assert!(remote.len() > 190 && special.len() == 6, "the list is whole");
    for (number, (name, _)) in &remote {
        assert_eq!(NAMES[*number as usize - 1], *name);
    }
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    server.guest("c1", InstanceKind::Container, true).await;
    let revision = server.settled().await;
    for (uri, name) in [("qemu:///system", "v1"), ("lxc:///system", "c1")] {
        let mut client = server.open("ro", uri).await;
        let domain = client.domain(name).await;
        // Not its opening and its end.
        for number in 3..=NAMES.len() as i32 {
            let answer = client.call(number, &domain).await;
            let code = answer.as_ref().err().map(|refused| refused.0);
            let wanted = match (remote.get(&number), table::find(REMOTE, number)) {
                (_, None) => Some(Code::NoSupport as i32),
                (Some((_, false)), Some(_)) => Some(Code::OperationDenied as i32),
                // Seen: whatever it answers, it is not that.
                _ => {
                    assert_ne!(
                        code,
                        Some(Code::OperationDenied as i32),
                        "{uri} {}",
                        NAMES[number as usize - 1]
                    );
                    continue;
                }
            };
            assert_eq!(code, wanted, "{uri} {}: {answer:?}", NAMES[number as usize - 1]);
        }
        for number in special.keys() {
            let there = table::find(QEMU, *number).is_some();
            let wanted = if there { Code::OperationDenied } else { Code::NoSupport };
            assert_eq!(qemu(&mut client, *number, &domain).await, Err(wanted as i32), "{uri} QEMU {number}");
        }
    }
    // Of what the agent inside tells of a guest.
    let mut client = server.open("ro", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let source = |n: u32| {
        let said = argument(|w| {
            w.u32(n).u32(0);
        });
        [v1.clone(), said].concat()
    };
    let refused = client.call(353, &source(1)).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32, "{refused:?}");
    client.call(353, &source(0)).await.unwrap();
    assert_eq!(server.engine.inner().inventory.read().revision, revision);
}

/// A connection that the table lets do everything, of somebody who may only see.
async fn viewer(server: &Server) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut principal = Principal::unix_admin(1000, 1000, 1);
    principal.grants = vec![Grant { role: Role::Viewer, project: None }];
    let place = Clients::new(Bounds::default().full).admit(1000u32).unwrap();
    let allowance = place.allowance.clone();
    let peer = Peer { context: Context::new(principal), read_only: false, stands: None, allowance };
    tokio::spawn(session::serve(server.front.clone(), peer, Transport::Unix(ours)));
    let mut client = Client { stream: theirs, serial: 0 };
    let open = argument(|w| {
        w.optional(Some("qemu:///system")).u32(0);
    });
    client.call(1, &open).await.unwrap();
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_engine_denies_changes_whatever_the_socket() {
    let server = Server::start().await;
    server.guest("on", InstanceKind::VirtualMachine, true).await;
    server.guest("off", InstanceKind::VirtualMachine, false).await;
    let config = Config::from([("size".into(), "1MiB".into())]);
    let volume =
        CreateVolume { name: "d1".into(), content: VolumeContent::Block, description: String::new(), config };
    let admin = Context::new(Principal::system());
    let made = server.engine.volume_create(&admin, "default", "default", volume).await.unwrap();
    assert_eq!(made.ended().await.error, None);
    let mut client = viewer(&server).await;
    let (on, off) = (client.domain("on").await, client.domain("off").await);
    let text = |text: &str| {
        argument(|w| {
            w.string(text);
        })
    };
    let n = |numbers: &[u32]| {
        argument(|w| {
            for n in numbers {
                w.u32(*n);
            }
        })
    };
    let d1 = client.call(number("STORAGE_VOL_LOOKUP_BY_PATH"), &text("/karst/default/d1")).await.unwrap();
    let pool = client.call(number("STORAGE_POOL_LOOKUP_BY_NAME"), &text("default")).await.unwrap();
    let domain = "<domain type='qemu'><name>new</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>\
        <os><type machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>\
        <source file='/karst/default/d1'/><target dev='vda' bus='virtio'/></disk></devices></domain>";
    let disk = "<disk type='file' device='disk'><source file='/karst/default/d1'/><target dev='vdb' bus='virtio'/></disk>";
    let network = "<network><name>n9</name><forward mode='nat'/><ip address='10.9.9.1' netmask='255.255.255.0'/></network>";
    let revision = server.settled().await;
    // Arguments that whoever may would succeed with.
    let calls: Vec<(&str, Vec<u8>)> = vec![
        ("DOMAIN_CREATE", off.clone()),
        ("DOMAIN_CREATE_WITH_FLAGS", [off.clone(), n(&[0])].concat()),
        ("DOMAIN_DESTROY", on.clone()),
        ("DOMAIN_DESTROY_FLAGS", [on.clone(), n(&[0])].concat()),
        ("DOMAIN_SUSPEND", on.clone()),
        ("DOMAIN_RESET", [on.clone(), n(&[0])].concat()),
        ("DOMAIN_SET_AUTOSTART", [off.clone(), n(&[1])].concat()),
        ("DOMAIN_SET_MEMORY_FLAGS", [off.clone(), n(&[0, 524_288, 2])].concat()),
        ("DOMAIN_SET_VCPUS_FLAGS", [off.clone(), n(&[1, 2])].concat()),
        ("DOMAIN_UNDEFINE_FLAGS", [off.clone(), n(&[4])].concat()),
        ("DOMAIN_DEFINE_XML", text(domain)),
        ("DOMAIN_CREATE_XML", [text(domain), n(&[0])].concat()),
        ("DOMAIN_ATTACH_DEVICE_FLAGS", [off.clone(), text(disk), n(&[2])].concat()),
        ("DOMAIN_SNAPSHOT_CREATE_XML", [off.clone(), text("<domainsnapshot/>"), n(&[0])].concat()),
        ("STORAGE_VOL_DELETE", [d1.clone(), n(&[0])].concat()),
        ("STORAGE_VOL_WIPE", [d1.clone(), n(&[0])].concat()),
        ("STORAGE_VOL_UPLOAD", [d1.clone(), n(&[0; 5])].concat()),
        ("STORAGE_VOL_DOWNLOAD", [d1.clone(), n(&[0; 5])].concat()),
        (
            "STORAGE_VOL_CREATE_XML",
            [pool, text("<volume><name>d2</name><capacity>1048576</capacity></volume>"), n(&[0])].concat(),
        ),
        ("NETWORK_DEFINE_XML", text(network)),
    ];
    for (name, payload) in calls {
        let refused: Refused = client.call(number(name), &payload).await.expect_err(name);
        assert_eq!(refused.0, Code::AccessDenied as i32, "{name}: {refused:?}");
    }
    assert_eq!(server.engine.inner().inventory.read().revision, revision);
    assert_eq!((client.state(&on).await.0, client.state(&off).await.0), (1, 5));
}
