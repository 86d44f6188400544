//! Screens: descriptors both ways over the socket, and what documents say of them.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::number,
    support::{Client, PATIENCE, Server, argument},
};
use karst_engine::secrets::SecretKey;
use karst_frontend_libvirt::{
    error::Code,
    fds,
    frame::{Frame, Header, Kind, REMOTE, Status},
    xdr::{Reader, Writer},
};
use karst_model::instance::InstanceKind;
use std::os::fd::OwnedFd;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

const OPEN: i32 = 249;
const OPEN_FD: i32 = 343;

/// A call with descriptors.
async fn call_with(client: &mut Client, procedure: i32, payload: &[u8], fds: Vec<OwnedFd>) -> Frame {
    client.serial += 1;
    let header = Header {
        program: REMOTE,
        version: 1,
        procedure,
        kind: Kind::CallWithFds,
        serial: client.serial,
        status: Status::Ok,
    };
    let payload = [&(fds.len() as u32).to_be_bytes()[..], payload].concat();
    client.stream.write_all(&Frame::new(header, payload).encode()).await.unwrap();
    fds::send(&client.stream, fds).await.unwrap();
    client.receive().await
}

fn arguments(write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer) -> Vec<u8> {
    argument(|w| {
        write(w);
    })
}

fn code(frame: &Frame) -> i32 {
    assert_eq!(frame.header.status, Status::Error);
    Reader::new(&frame.payload).i32().unwrap()
}

/// What is at the other end speaks RFB, and takes what is said to it.
async fn speaks(mut screen: UnixStream) {
    let told = async {
        let mut greeting = [0; 12];
        screen.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"RFB 003.008\n");
        screen.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        screen.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hello");
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
}

fn screen_of(domain: &[u8], index: u32) -> Vec<u8> {
    [domain, &index.to_be_bytes(), &0u32.to_be_bytes()].concat()
}

fn pair() -> (UnixStream, OwnedFd) {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    (UnixStream::from_std(near).unwrap(), far.into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_gets_the_screen_as_a_descriptor() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    client.send(OPEN_FD, &screen_of(&v1, 0)).await;
    let answer = client.receive().await;
    assert_eq!((answer.header.kind, answer.header.status), (Kind::ReplyWithFds, Status::Ok));
    assert_eq!(*answer.payload, [0, 0, 0, 1]);
    let fd = fds::take(&client.stream).await.unwrap();
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true).unwrap();
    // The connection goes on with the next call, and its end does not end the viewer.
    assert_eq!(client.names().await, ["v1"]);
    drop(client);
    speaks(UnixStream::from_std(stream).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_brings_its_own_descriptor() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let (near, far) = pair();
    let answer = call_with(&mut client, OPEN, &screen_of(&v1, 0), vec![far]).await;
    assert_eq!((answer.header.kind, answer.header.status), (Kind::Reply, Status::Ok));
    assert!(answer.payload.is_empty());
    speaks(near).await;
    assert_eq!(client.names().await, ["v1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_viewer_is_refused_and_keeps_nothing_open() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    server.guest("off", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let (v1, off) = (client.domain("v1").await, client.domain("off").await);
    let not_valid = Code::OperationInvalid as i32;
    assert_eq!(client.call(OPEN_FD, &screen_of(&off, 0)).await.unwrap_err().0, not_valid);
    assert_eq!(client.call(OPEN_FD, &screen_of(&v1, 1)).await.unwrap_err().0, not_valid);
    let flags = [&v1[..], &[0; 4], &[0, 0, 0, 2]].concat();
    assert_eq!(client.call(OPEN_FD, &flags).await.unwrap_err().0, Code::InvalidArg as i32);
    assert_eq!(client.call(OPEN, &screen_of(&v1, 0)).await.unwrap_err().0, Code::InvalidArg as i32);
    // Two where one is taken; and a file. Whoever sent a socket sees its end.
    let ((mut near, far), (_other, second)) = (pair(), pair());
    let two = call_with(&mut client, OPEN, &screen_of(&v1, 0), vec![far, second]).await;
    assert_eq!(code(&two), Code::InvalidArg as i32);
    let mut rest = vec![];
    tokio::time::timeout(PATIENCE, near.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
    let file = tempfile::tempfile().unwrap();
    let refused = call_with(&mut client, OPEN, &screen_of(&v1, 0), vec![file.into()]).await;
    assert_eq!(code(&refused), Code::InvalidArg as i32);
    // Beside a call that takes none they are closed, and the call is answered.
    let (mut near, far) = pair();
    let answer = call_with(&mut client, 59, &[], vec![far]).await;
    assert_eq!(answer.header.status, Status::Ok);
    tokio::time::timeout(PATIENCE, near.read_to_end(&mut rest)).await.unwrap().unwrap();
    let mut read_only = server.open("ro", "qemu:///system").await;
    let refused = read_only.call(OPEN_FD, &screen_of(&v1, 0)).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_that_were_announced_and_do_not_come_end_the_connection() {
    let server = Server::start().await;
    let mut good = server.open("full", "qemu:///system").await;
    let header = Header {
        program: REMOTE,
        version: 1,
        procedure: OPEN,
        kind: Kind::CallWithFds,
        serial: 9,
        status: Status::Ok,
    };
    // Too many, no number at all, and bytes in their place.
    for (payload, more) in [(&33u32.to_be_bytes()[..], &[][..]), (&[], &[]), (&1u32.to_be_bytes(), &[0])] {
        let mut bad = server.connect("full").await;
        bad.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.unwrap();
        bad.stream.write_all(more).await.unwrap();
        let mut rest = vec![];
        let ended = tokio::time::timeout(PATIENCE, bad.stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty());
    }
    assert!(good.names().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_say_that_there_is_a_screen_and_no_port() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let xml = "<domain type='qemu'><name>d1</name><memory>65536</memory><os><type machine='q35'>hvm</type></os>\
        <devices><disk type='volume' device='disk'><source pool='default' volume='root'/><target dev='vda' bus='virtio'/></disk>\
        <graphics type='spice' autoport='yes'/></devices></domain>";
    let volume = "<volume><name>root</name><capacity unit='MiB'>64</capacity></volume>";
    let pool = client.call(84, &arguments(|w| w.string("default"))).await.unwrap();
    let create = [&pool[..], &arguments(|w| w.string(volume).u32(0))].concat();
    client.call(93, &create).await.unwrap();
    let d1 = client.call(11, &arguments(|w| w.string(xml))).await.unwrap();
    let document = async |client: &mut Client, domain: &[u8], flags: u32| {
        let payload = client.call(14, &[domain, &flags.to_be_bytes()].concat()).await.unwrap();
        Reader::new(&payload).string().unwrap()
    };
    let screen = "    <graphics type='vnc'>\n      <listen type='none'/>\n    </graphics>\n";
    // One that was not made by a document has what every machine has.
    let v1 = client.domain("v1").await;
    for flags in [0, 2] {
        let text = document(&mut client, &v1, flags).await;
        assert!(text.contains(screen) && text.contains("<video>") && !text.contains("spice"), "{text}");
    }
    // A document's word stands; what runs has SPICE by it, what belongs to that, and VNC as every machine.
    assert!(document(&mut client, &d1, 2).await.contains("<graphics type='spice' autoport='yes'/>"));
    client.call(9, &d1).await.unwrap();
    let live = document(&mut client, &d1, 0).await;
    let both = format!("{}{screen}", screen.replace("vnc", "spice"));
    assert!(
        live.contains(&both) && live.matches("<redirdev bus='usb' type='spicevmc'>").count() == 3,
        "{live}"
    );
    assert!(live.contains("<target type='virtio' name='com.redhat.spice.0'/>"), "{live}");
    assert!(document(&mut client, &d1, 2).await.contains("<graphics type='spice' autoport='yes'/>"));
    // Each of the viewer's channels is a connection to the first of them; the second is VNC.
    for _ in 0..2 {
        let (mut near, far) = pair();
        let answer = call_with(&mut client, OPEN, &screen_of(&d1, 0), vec![far]).await;
        assert_eq!(answer.header.status, Status::Ok);
        let told = async {
            near.write_all(b"REDQ").await.unwrap();
            let mut magic = [0; 4];
            near.read_exact(&mut magic).await.unwrap();
            assert_eq!(&magic, b"REDQ");
        };
        tokio::time::timeout(PATIENCE, told).await.unwrap();
    }
    let (near, far) = pair();
    let answer = call_with(&mut client, OPEN, &screen_of(&d1, 1), vec![far]).await;
    assert_eq!(answer.header.status, Status::Ok);
    speaks(near).await;
    let none = client.call(OPEN_FD, &screen_of(&d1, 2)).await.unwrap_err();
    assert_eq!(none.0, Code::OperationInvalid as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_screen_has_a_password_that_only_who_may_is_shown() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let document = async |client: &mut Client, domain: &[u8], flags: u32| {
        let payload = client.call(14, &[domain, &flags.to_be_bytes()].concat()).await.unwrap();
        Reader::new(&payload).string().unwrap()
    };
    let update = async |client: &mut Client, domain: &[u8], xml: &str, flags: u32| {
        let payload = [domain, &arguments(|w| w.string(xml).u32(flags))].concat();
        client.call(number("DOMAIN_UPDATE_DEVICE_FLAGS"), &payload).await
    };
    let guarded = "<graphics type='vnc' passwd='opensesa' passwdValidTo='2200-01-31T12:00:00'/>";
    let keyless = update(&mut client, &v1, guarded, 1).await.unwrap_err();
    assert_eq!(keyless.0, Code::OperationFailed as i32, "{keyless:?}");
    server.engine.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    for (bad, word) in [
        ("<graphics type='sdl' passwd='x'/>", "graphics passwd"),
        ("<graphics type='spice' passwd='x'/>", "graphics type"),
        ("<graphics type='spice'/>", "graphics type"),
        ("<graphics type='vnc' passwd=''/>", "empty"),
        ("<graphics type='vnc' passwd='ninechars'/>", "9 characters"),
        ("<graphics type='vnc' passwd='x' connected='disconnect'/>", "graphics connected"),
        ("<graphics type='vnc' passwd='x' port='5901'/>", "the password changes"),
        ("<graphics type='vnc' passwd='x'><listen type='address' address='0.0.0.0'/></graphics>", "changes"),
    ] {
        let (code, text) = update(&mut client, &v1, bad, 1).await.unwrap_err();
        assert!(code == Code::ConfigUnsupported as i32 && text.contains(word), "{bad}: {text}");
        assert!(!text.contains("ninechars"), "{text}");
    }
    let soon = "<graphics type='vnc' passwd='x' passwdValidTo='soon'/>";
    assert_eq!(update(&mut client, &v1, soon, 1).await.unwrap_err().0, Code::XmlError as i32);
    assert!(!document(&mut client, &v1, 1).await.contains("passwd"), "what was refused changed nothing");
    update(&mut client, &v1, guarded, 3).await.unwrap();
    let whole = "<graphics type='vnc' passwd='opensesa' passwdValidTo='2200-01-31T12:00:00'>";
    for (flags, wanted) in [
        (0, "<graphics type='vnc' passwdValidTo='2200-01-31T12:00:00'>"),
        (1, whole),
        (2, "<graphics type='vnc' passwdValidTo='2200-01-31T12:00:00'>"),
        (3, whole),
    ] {
        let text = document(&mut client, &v1, flags).await;
        assert!(text.contains(wanted), "{flags}: {text}");
    }
    let mut read_only = server.open("ro", "qemu:///system").await;
    let refused = read_only.call(14, &[&v1[..], &1u32.to_be_bytes()].concat()).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32);
    assert!(!document(&mut read_only, &v1, 0).await.contains("opensesa"));
    // Who comes is asked for it, unless he says that libvirt's word is enough.
    for (flags, offers) in [(0u32, true), (1, false)] {
        let (mut near, far) = pair();
        let payload = [&v1[..], &0u32.to_be_bytes(), &flags.to_be_bytes()].concat();
        let answer = call_with(&mut client, OPEN, &payload, vec![far]).await;
        assert_eq!(answer.header.status, Status::Ok);
        let mut greeting = [0; 12];
        let told = async {
            near.read_exact(&mut greeting).await.unwrap();
            near.write_all(b"hello").await.unwrap();
            let mut next = [0; 2];
            near.read_exact(&mut next).await.unwrap();
            assert_eq!(next == [1, 2], offers);
        };
        tokio::time::timeout(PATIENCE, told).await.unwrap();
    }
    // A definition brings one along, and takes it away; what is kept of its words has none.
    let xml = |uuid: &str, screen: &str| {
        format!(
            "<domain type='qemu'><name>d1</name>{uuid}<memory>65536</memory><os><type machine='q35'>hvm</type></os><devices>\
             <disk type='volume' device='disk'><source pool='default' volume='root'/><target dev='vda' bus='virtio'/></disk>\
             {screen}</devices></domain>"
        )
    };
    let volume = "<volume><name>root</name><capacity unit='MiB'>64</capacity></volume>";
    let pool = client.call(84, &arguments(|w| w.string("default"))).await.unwrap();
    client.call(93, &[&pool[..], &arguments(|w| w.string(volume).u32(0))].concat()).await.unwrap();
    let define = async |client: &mut Client, uuid: &str, screen: &str| {
        client.call(11, &arguments(|w| w.string(&xml(uuid, screen)))).await
    };
    let defined = "<graphics type='vnc' port='-1' autoport='yes' passwd='closed'/>";
    let two = format!("{defined}{defined}");
    assert_eq!(define(&mut client, "", &two).await.unwrap_err().0, Code::ConfigUnsupported as i32);
    let d1 = define(&mut client, "", defined).await.unwrap();
    // A reference to a domain: its name (a length, the bytes, padding), then its UUID.
    let uuid = format!("<uuid>{}</uuid>", uuid::Uuid::from_slice(&d1[8..24]).unwrap());
    assert!(document(&mut client, &d1, 3).await.contains(defined));
    assert!(!document(&mut client, &d1, 2).await.contains("passwd"));
    let kept = {
        let admin = karst_engine::Context::new(karst_model::access::Principal::unix_admin(0, 0, 1));
        let view = server.engine.instance(&admin, "default", "d1").unwrap();
        format!("{:?}", view.instance.config)
    };
    assert!(kept.contains("autoport") && !kept.contains("closed"), "{kept}");
    // SPICE and VNC have the same one.
    let both = |a: &str, b: &str| format!("<graphics type='spice'{a}/><graphics type='vnc'{b}/>");
    for (a, b) in [(" passwd='one'", " passwd='two'"), (" passwd='one'", ""), ("", " passwd='two'")] {
        let (code, text) = define(&mut client, &uuid, &both(a, b)).await.unwrap_err();
        assert!(code == Code::ConfigUnsupported as i32 && text.contains("the same"), "{text}");
    }
    define(&mut client, &uuid, &both(" passwd='one'", " passwd='one'")).await.unwrap();
    assert!(document(&mut client, &d1, 3).await.contains("<graphics type='spice' passwd='one'/>"));
    // What would protect more than is done is refused.
    for (bad, word) in [
        ("<graphics type='spice'><clipboard copypaste='no'/></graphics>", "graphics clipboard"),
        ("<graphics type='spice'><filetransfer enable='no'/></graphics>", "graphics filetransfer"),
        ("<graphics type='spice'><gl enable='yes'/></graphics>", "graphics gl"),
        ("<graphics type='spice'><channel name='main' mode='secure'/></graphics>", "graphics channel"),
        ("<graphics type='spice' defaultMode='secure'/>", "graphics channel"),
        ("<graphics type='spice'/><graphics type='spice'/>", "one screen of type spice"),
    ] {
        let (code, text) = define(&mut client, &uuid, bad).await.unwrap_err();
        assert!(code == Code::ConfigUnsupported as i32 && text.contains(word), "{bad}: {text}");
    }
    define(&mut client, &uuid, "<graphics type='spice' autoport='yes'/>").await.unwrap();
    assert!(!document(&mut client, &d1, 3).await.contains("passwd"));
    define(&mut client, &uuid, "<graphics type='vnc' port='-1' autoport='yes' passwd='closed'/>")
        .await
        .unwrap();
    define(&mut client, &uuid, "<graphics type='vnc' port='-1' autoport='yes'/>").await.unwrap();
    assert!(!document(&mut client, &d1, 3).await.contains("passwd"));
}

/// A machine on a disk of its own, with these screens.
fn machine(name: &str, screens: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory>65536</memory><os><type machine='q35'>hvm</type></os><devices>\
         <disk type='volume' device='disk'><source pool='default' volume='{name}'/><target dev='vda' bus='virtio'/></disk>\
         {screens}</devices></domain>"
    )
}

async fn define(client: &mut Client, name: &str, screens: &str) -> Result<Vec<u8>, (i32, String)> {
    let pool = client.call(84, &arguments(|w| w.string("default"))).await.unwrap();
    let volume = format!("<volume><name>{name}</name><capacity unit='MiB'>64</capacity></volume>");
    // It may be there from before.
    let _ = client.call(93, &[&pool[..], &arguments(|w| w.string(&volume).u32(0))].concat()).await;
    client.call(11, &arguments(|w| w.string(&machine(name, screens)))).await
}

async fn document(client: &mut Client, domain: &[u8], flags: u32) -> String {
    let payload = client.call(14, &[domain, &flags.to_be_bytes()].concat()).await.unwrap();
    Reader::new(&payload).string().unwrap()
}

/// The attribute of the first `<graphics>` of a kind in a document of what runs, once there is one.
async fn port(client: &mut Client, domain: &[u8], kind: &str, attribute: &str) -> u16 {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let text = document(client, domain, 0).await;
        let root = karst_frontend_libvirt::xml::read::document(&text).unwrap();
        let of = |e: &&karst_frontend_libvirt::xml::Element| e.attribute("type") == Some(kind);
        let found = root.find("devices").unwrap().all("graphics").find(of).unwrap();
        if let Some(port) = found.attribute(attribute) {
            return port.parse().unwrap();
        }
        assert!(std::time::Instant::now() < end, "no {attribute}: {text}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// What is at a port says what a server of RFB says first, and takes what is said to it.
async fn speaks_at(port: u16) {
    let mut screen = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let told = async {
        let mut greeting = [0; 12];
        screen.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"RFB 003.008\n");
        screen.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        screen.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hello");
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
}

/// Nobody listens there, sooner or later.
async fn ends(port: u16) {
    let end = std::time::Instant::now() + PATIENCE;
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
        assert!(std::time::Instant::now() < end, "port {port} is still there");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// A port that nobody has at the moment.
fn free() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn screens_listen_where_their_documents_say() {
    let server = Server::start().await;
    server.engine.screens_open();
    let mut client = server.open("full", "qemu:///system").await;
    let fixed = free();
    let said = format!(
        "<graphics type='vnc' port='{fixed}' autoport='no' websocket='-1' listen='127.0.0.1' sharePolicy='ignore'/>"
    );
    let d1 = define(&mut client, "d1", &said).await.unwrap();
    let d2 = define(&mut client, "d2", "<graphics type='spice' autoport='yes'/><graphics type='vnc'/>")
        .await
        .unwrap();
    assert!(document(&mut client, &d1, 2).await.contains(&said), "as it was written");
    for domain in [&d1, &d2] {
        client.call(9, domain).await.unwrap();
    }
    assert_eq!(port(&mut client, &d1, "vnc", "port").await, fixed);
    speaks_at(fixed).await;
    let live = document(&mut client, &d1, 0).await;
    assert!(live.contains("sharePolicy='ignore'") && live.contains("address='127.0.0.1'"), "{live}");
    // A browser's way to it.
    let at = port(&mut client, &d1, "vnc", "websocket").await;
    let mut web = tokio::net::TcpStream::connect(("127.0.0.1", at)).await.unwrap();
    let asked = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: binary\r\n\r\n";
    let told = async {
        web.write_all(asked.as_bytes()).await.unwrap();
        let mut all = vec![];
        // A message of binary data, of 12 bytes.
        while !all.ends_with(b"\x82\x0cRFB 003.008\n") {
            all.push(web.read_u8().await.unwrap());
        }
        let text = String::from_utf8_lossy(&all).to_ascii_lowercase();
        assert!(text.contains("101 switching") && text.contains("sec-websocket-protocol: binary"), "{text}");
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    // Two that take any have one each.
    let (spice, vnc) =
        (port(&mut client, &d2, "spice", "port").await, port(&mut client, &d2, "vnc", "port").await);
    assert!(spice != vnc && ![spice, vnc].contains(&fixed) && spice >= 5900 && vnc >= 5900);
    speaks_at(vnc).await;
    // There are 32 places; who comes for one more is let go at once.
    let (mut viewers, mut refused) = (vec![], 0);
    for _ in 0..40 {
        let mut viewer = tokio::net::TcpStream::connect(("127.0.0.1", vnc)).await.unwrap();
        let mut greeting = [0; 12];
        match tokio::time::timeout(PATIENCE, viewer.read_exact(&mut greeting)).await.unwrap() {
            Ok(_) => viewers.push(viewer),
            Err(_) => refused += 1,
        }
    }
    assert!(viewers.len() <= 32 && refused >= 8, "{} viewers", viewers.len());
    drop(viewers);
    // Live changed, by the key that says it.
    let admin = karst_engine::Context::new(karst_model::access::Principal::system());
    let change = async |key: &str, value: String| {
        let view = server.engine.instance(&admin, "default", "d1").unwrap();
        let mut config = view.instance.config.clone();
        config.insert(key.to_owned(), value);
        let request = karst_engine::compute::update::UpdateInstance {
            description: String::new(),
            ephemeral: false,
            config,
            devices: view.instance.devices.clone(),
            profiles: vec![],
            if_version: None,
        };
        let changed = server.engine.instance_update(&admin, "default", "d1", request).await.unwrap();
        assert_eq!(changed.ended().await.error, None);
    };
    let other = free();
    change("screen.vnc.listen", format!("127.0.0.1:{other}")).await;
    ends(fixed).await;
    assert_eq!(port(&mut client, &d1, "vnc", "port").await, other);
    speaks_at(other).await;
    assert!(document(&mut client, &d1, 2).await.contains(&format!("port='{other}'")));
    // With the guest it ends.
    client.call(12, &d1).await.unwrap();
    ends(other).await;
    let state = server.engine.display_state(&admin, "default", "d1").unwrap();
    assert_eq!(state.listeners, []);
    // Who comes next finds the ports that were free once where they were.
    server.engine.close();
    ends(vnc).await;
    server.engine.screens_open();
    assert_eq!(port(&mut client, &d2, "vnc", "port").await, vnc);
    assert_eq!(port(&mut client, &d2, "spice", "port").await, spice);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn screens_listen_where_the_host_lets_them_only() {
    let screens = karst_model::screens::ScreenGrants { listen: vec!["127.0.0.1".into()], open: vec![] };
    let options = karst_agent::SimulatedOptions { screens, ..Default::default() };
    let server = Server::on(karst_frontend_libvirt::bounds::Bounds::default(), options).await;
    server.engine.screens_open();
    server.engine.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    let mut client = server.open("full", "qemu:///system").await;
    for (bad, word) in [
        ("<graphics type='vnc' port='5907' listen='::1' passwd='x'/>", "graphics listen"),
        ("<graphics type='vnc' port='5907'/>", "graphics passwd"),
        ("<graphics type='spice' autoport='yes' listen='127.0.0.1'/>", "graphics passwd"),
        ("<graphics type='vnc'><listen type='socket' socket='/tmp/x'/></graphics>", "graphics"),
    ] {
        let (code, text) = define(&mut client, "d1", bad).await.unwrap_err();
        assert!(code == Code::ConfigUnsupported as i32 && text.contains(word), "{bad}: {text}");
    }
    // What asks for no place is taken everywhere, and does not listen without a password.
    let d1 = define(&mut client, "d1", "<graphics type='vnc' port='-1' autoport='yes'/>").await.unwrap();
    client.call(9, &d1).await.unwrap();
    let admin = karst_engine::Context::new(karst_model::access::Principal::system());
    let end = std::time::Instant::now() + PATIENCE;
    let why = loop {
        let state = server.engine.display_state(&admin, "default", "d1").unwrap();
        if let [one] = &state.listeners[..] {
            assert_eq!(one.at, None);
            break one.why.clone().unwrap();
        }
        assert!(std::time::Instant::now() < end);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert!(why.contains("screen_listen_open"), "{why}");
    assert!(document(&mut client, &d1, 0).await.contains("<listen type='none'/>"));
    let xml = "<graphics type='vnc' passwd='opensesa'/>";
    let payload = [&d1[..], &arguments(|w| w.string(xml).u32(1))].concat();
    client.call(number("DOMAIN_UPDATE_DEVICE_FLAGS"), &payload).await.unwrap();
    let at = port(&mut client, &d1, "vnc", "port").await;
    let mut screen = tokio::net::TcpStream::connect(("127.0.0.1", at)).await.unwrap();
    let told = async {
        let mut greeting = [0; 14];
        screen.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"RFB 003.008\n\x01\x02", "it asks for the password");
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    // Without it the port goes too.
    let payload = [&d1[..], &arguments(|w| w.string("<graphics type='vnc'/>").u32(1))].concat();
    client.call(number("DOMAIN_UPDATE_DEVICE_FLAGS"), &payload).await.unwrap();
    ends(at).await;
    // Elsewhere it is the engine that says it.
    let request = karst_engine::compute::create::CreateInstance {
        name: Some("v2".into()),
        kind: InstanceKind::VirtualMachine,
        description: String::new(),
        ephemeral: false,
        config: [("screen.vnc.listen".to_owned(), "0.0.0.0:5901".to_owned())].into(),
        devices: Default::default(),
        profiles: None,
        source: karst_engine::compute::create::InstanceSource::None,
        start: false,
        target: None,
        vmid: None,
    };
    let e = server.engine.instance_create(&admin, "default", request).await.map(drop).unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.screen.vnc.listen"));
    assert!(e.message.contains("screen_listen = [\"0.0.0.0\"]"), "{e}");
}
