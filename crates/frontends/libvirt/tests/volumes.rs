//! Bytes of volumes as streams: up and down, sparse, broken off, beyond the end; and what runs is left alone.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Server, argument};
use karst_engine::{Context, volumes::create::CreateVolume};
use karst_frontend_libvirt::{
    bounds::Bounds,
    error::Code,
    frame::{Frame, Header, Kind, REMOTE, Status},
    xdr::Reader,
};
use karst_model::{Config, access::Principal, storage::VolumeContent};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SIZE: usize = 1 << 20;
const UPLOAD: i32 = 208;
const DOWNLOAD: i32 = 209;

async fn ready() -> (Server, Client, Vec<u8>) {
    on(Server::start().await).await
}

async fn on(server: Server) -> (Server, Client, Vec<u8>) {
    let config = Config::from([("size".into(), SIZE.to_string())]);
    let content = VolumeContent::Block;
    let request = CreateVolume { name: "d1".into(), content, description: String::new(), config };
    let admin = Context::new(Principal::system());
    let operation = server.engine.volume_create(&admin, "default", "default", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let mut client = server.open("full", "qemu:///system").await;
    let path = argument(|w| {
        w.string("/karst/default/d1");
    });
    let volume = client.call(97, &path).await.unwrap();
    (server, client, volume)
}

fn asked(volume: &[u8], offset: u64, length: u64, flags: u32) -> Vec<u8> {
    let mut all = volume.to_vec();
    all.extend(argument(|w| {
        w.u64(offset).u64(length).u32(flags);
    }));
    all
}

/// Sends a frame of the stream that the last call opened.
async fn put(client: &mut Client, procedure: i32, kind: Kind, status: Status, payload: Vec<u8>) {
    let header = Header { program: REMOTE, version: 1, procedure, kind, serial: client.serial, status };
    client.stream.write_all(&Frame::new(header, payload).encode()).await.unwrap();
}

/// The stream's end: nothing, or the text of its error.
async fn ended(client: &mut Client) -> Result<(), String> {
    let frame = client.receive().await;
    assert_eq!((frame.header.kind, frame.header.serial), (Kind::Stream, client.serial));
    match frame.header.status {
        Status::Ok => Ok(()),
        _ => {
            let mut r = Reader::new(&frame.payload);
            let _ = (r.i32().unwrap(), r.i32().unwrap());
            Err(r.option(|r| r.string()).unwrap().unwrap())
        }
    }
}

/// What comes down, holes as zeros, and how many holes there were.
async fn down(
    client: &mut Client,
    volume: &[u8],
    offset: u64,
    length: u64,
    sparse: bool,
) -> (Vec<u8>, usize) {
    client.call(DOWNLOAD, &asked(volume, offset, length, u32::from(sparse))).await.unwrap();
    let (mut data, mut holes) = (vec![], 0);
    loop {
        let frame = client.receive().await;
        assert_eq!(frame.header.status, Status::Continue);
        match frame.header.kind {
            Kind::StreamHole => {
                let length = Reader::new(&frame.payload).u64().unwrap();
                data.resize(data.len() + length as usize, 0);
                holes += 1;
            }
            _ if frame.payload.is_empty() => break,
            _ => data.extend_from_slice(&frame.payload),
        }
    }
    put(client, DOWNLOAD, Kind::Stream, Status::Ok, vec![]).await;
    ended(client).await.unwrap();
    (data, holes)
}

async fn data(client: &mut Client, bytes: &[u8]) {
    put(client, UPLOAD, Kind::Stream, Status::Continue, bytes.to_vec()).await;
}

async fn finish(client: &mut Client) -> Result<(), String> {
    put(client, UPLOAD, Kind::Stream, Status::Ok, vec![]).await;
    ended(client).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_up_comes_down() {
    let (_server, mut client, volume) = ready().await;
    assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, vec![0; SIZE]);
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    for _ in 0..4 {
        data(&mut client, &vec![7; SIZE / 4]).await;
    }
    finish(&mut client).await.unwrap();
    assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, vec![7; SIZE]);
    // A part, with a hole in it.
    client.call(UPLOAD, &asked(&volume, 100, 0, 1)).await.unwrap();
    data(&mut client, b"abc").await;
    let hole = argument(|w| {
        w.u64(5).u32(0);
    });
    put(&mut client, UPLOAD, Kind::StreamHole, Status::Continue, hole).await;
    data(&mut client, b"def").await;
    finish(&mut client).await.unwrap();
    let (part, _) = down(&mut client, &volume, 99, 13, false).await;
    assert_eq!(part, b"\x07abc\0\0\0\0\0def\x07");
    let (rest, _) = down(&mut client, &volume, SIZE as u64 - 2, 50, true).await;
    assert_eq!(rest, [7, 7]);
    client.call(165, &[volume.clone(), vec![0; 4]].concat()).await.unwrap();
    let (wiped, holes) = down(&mut client, &volume, 0, 0, true).await;
    assert!(wiped == vec![0; SIZE] && holes == 1, "its space is given back");
    let random = [
        volume,
        argument(|w| {
            w.u32(8).u32(0);
        }),
    ];
    let refused = client.call(259, &random.concat()).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationUnsupported as i32);
}

/// What is sent into a stream goes into that one, and it ends for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serial_has_one_stream() {
    let (_server, mut client, volume) = ready().await;
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut client, b"first").await;
    for procedure in [UPLOAD, DOWNLOAD, 273] {
        client.serial -= 1;
        let refused = client.call(procedure, &asked(&volume, 8, 0, 0)).await.unwrap_err();
        assert!(refused.0 == Code::Rpc as i32 && refused.1.contains("serial"), "{procedure}: {refused:?}");
    }
    data(&mut client, b" and last").await;
    finish(&mut client).await.unwrap();
    // It is free again.
    client.serial -= 1;
    let (began, _) = down(&mut client, &volume, 0, 16, false).await;
    assert_eq!(began, b"first and last\0\0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_broken_off_or_too_much_changes_nothing() {
    let (_server, mut client, volume) = ready().await;
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut client, b"lost").await;
    put(&mut client, UPLOAD, Kind::Stream, Status::Error, vec![]).await;
    ended(&mut client).await.unwrap();
    client.call(UPLOAD, &asked(&volume, 0, 10, 0)).await.unwrap();
    data(&mut client, b"more than ten").await;
    assert!(ended(&mut client).await.unwrap_err().contains("larger than the 10 bytes"));
    // Beyond its end.
    for (offset, length) in [(SIZE as u64, 1), (u64::MAX, 2), (0, SIZE as u64 + 1)] {
        let refused = client.call(UPLOAD, &asked(&volume, offset, length, 0)).await.unwrap_err();
        assert_eq!(refused.0, Code::InvalidArg as i32, "{refused:?}");
    }
    let beyond = client.call(DOWNLOAD, &asked(&volume, SIZE as u64 + 1, 0, 0)).await.unwrap_err();
    assert_eq!(beyond.0, Code::InvalidArg as i32);
    let flags = client.call(UPLOAD, &asked(&volume, 0, 0, 6)).await.unwrap_err();
    assert!(flags.1.contains("virStorageVolUpload"), "{flags:?}");
    assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, vec![0; SIZE]);
    // A client that goes away in mid-transfer.
    let server = _server;
    let mut other = server.open("full", "qemu:///system").await;
    other.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut other, b"lost").await;
    drop(other);
    assert_eq!(down(&mut client, &volume, 0, 4, false).await.0, [0; 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_with_a_volume_keeps_it() {
    let (_server, mut client, volume) = ready().await;
    let xml = "<domain type='qemu'><name>v1</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>\
        <os><type machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>\
        <source file='/karst/default/d1'/><target dev='vda' bus='virtio'/></disk></devices></domain>";
    let define = argument(|w| {
        w.string(xml).u32(0);
    });
    client.call(350, &define).await.unwrap();
    let v1 = client.domain("v1").await;
    client.call(9, &v1).await.unwrap();
    let refused = client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap_err();
    assert!(refused.1.contains("runs with volume"), "{refused:?}");
    assert!(client.call(165, &[volume.clone(), vec![0; 4]].concat()).await.unwrap_err().1.contains("runs"));
    assert!(client.call(DOWNLOAD, &asked(&volume, 0, 0, 0)).await.unwrap_err().1.contains("in use"));
    // Its figures meanwhile.
    let stats = [
        v1.clone(),
        argument(|w| {
            w.string("vda");
        }),
    ];
    let payload = client.call(64, &stats.concat()).await.unwrap();
    assert_eq!(Reader::new(&payload).u64().unwrap(), 4);
    client.call(12, &v1).await.unwrap();
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut client, b"now").await;
    finish(&mut client).await.unwrap();
    assert_eq!(down(&mut client, &volume, 0, 3, false).await.0, b"now");
}

/// Without a thread that writes, as a disk that stands still: what is sent and not taken in time is lost, and said to be.
#[test]
fn what_is_lost_of_an_upload_is_no_upload() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        // So long a client may take, too, to read what comes down.
        let bounds = Bounds { patience: Duration::from_secs(5), ..Bounds::default() };
        let (_server, mut client, volume) = on(Server::bounded(bounds).await).await;
        client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (began, begins) = tokio::sync::oneshot::channel();
        let stall = tokio::task::spawn_blocking(move || {
            began.send(()).unwrap();
            // Also when the test has failed meanwhile.
            let _ = held.recv();
        });
        begins.await.unwrap();
        for _ in 0..40 {
            data(&mut client, &[7; 4096]).await;
        }
        put(&mut client, UPLOAD, Kind::Stream, Status::Ok, vec![]).await;
        let refused = ended(&mut client).await.unwrap_err();
        assert!(refused.contains("not taken in time"), "{refused}");
        drop(release);
        stall.await.unwrap();
        // Its last word came after the end, which is told again as that of any stream that has ended.
        ended(&mut client).await.unwrap();
        assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, vec![0; SIZE]);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hole_that_is_none_is_an_error() {
    let (_server, mut client, volume) = ready().await;
    for hole in [
        argument(|w| {
            w.u64(u64::MAX).u32(0);
        }),
        argument(|w| {
            w.u64(5).u32(1);
        }),
        vec![0; 3],
    ] {
        client.call(UPLOAD, &asked(&volume, 0, 0, 1)).await.unwrap();
        data(&mut client, b"lost").await;
        put(&mut client, UPLOAD, Kind::StreamHole, Status::Continue, hole).await;
        assert!(ended(&mut client).await.unwrap_err().contains("a hole"));
    }
    assert_eq!(down(&mut client, &volume, 0, 4, false).await.0, [0; 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_uploads_are_bounded() {
    let (server, mut client, volume) = ready().await;
    // Of a project.
    for _ in 0..16 {
        client.call(UPLOAD, &asked(&volume, 0, 10, 0)).await.unwrap();
    }
    let refused = client.call(UPLOAD, &asked(&volume, 0, 10, 0)).await.unwrap_err();
    assert!(refused.1.contains("16 uploads"), "{refused:?}");
    drop(client);
    let mut client = server.open("full", "qemu:///system").await;
    let end = std::time::Instant::now() + crate::support::PATIENCE;
    while client.call(UPLOAD, &asked(&volume, 0, 10, 0)).await.is_err() {
        let text = "what a client that is gone had on its way is given back";
        assert!(std::time::Instant::now() < end, "{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Of a connection: reading takes no space.
    for _ in 1..32 {
        client.send(DOWNLOAD, &asked(&volume, 0, 1, 0)).await;
    }
    client.send(DOWNLOAD, &asked(&volume, 0, 1, 0)).await;
    let mut refused = vec![];
    for _ in 0..(32 + 31 * 2) {
        let frame = client.receive().await;
        if frame.header.kind == Kind::Reply && frame.header.status == Status::Error {
            refused.push(String::from_utf8_lossy(&frame.payload).into_owned());
        }
    }
    assert!(refused.len() == 1 && refused[0].contains("32 streams"), "{refused:?}");
    // A frame of a stream that no client sends ends the connection.
    let header = Header {
        program: REMOTE,
        version: 1,
        procedure: UPLOAD,
        kind: Kind::Stream,
        serial: client.serial,
        status: Status::Continue,
    };
    let frame = Frame::new(header, vec![0; (1 << 20) + 1]).encode();
    client.stream.write_all(&frame[..28]).await.unwrap();
    let mut rest = vec![];
    tokio::time::timeout(crate::support::PATIENCE, client.stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, Vec::<u8>::new());
}

/// The limit of a project's disks is one of what lies aside for them, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_aside_is_within_the_limit_of_disks() {
    let (server, mut client, volume) = ready().await;
    let admin = Context::new(Principal::system());
    let project = server.engine.inner().inventory.read().project("default").unwrap().value.clone();
    let config =
        Config::from_iter(project.config.into_iter().chain([("limits.disk".to_owned(), SIZE.to_string())]));
    server.engine.project_update(&admin, "default", &project.description, config, None).await.unwrap();
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    let refused = client.call(UPLOAD, &asked(&volume, 0, 1, 0)).await.unwrap_err();
    assert!(refused.1.contains("limits.disk"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_of_the_format_qcow2_takes_and_gives_images() {
    let (_server, mut client, raw) = ready().await;
    let name = argument(|w| {
        w.string("default");
    });
    let pool = client.call(84, &name).await.unwrap();
    let xml = "<volume><name>q1</name><capacity unit='MiB'>1</capacity><target><format type='qcow2'/></target></volume>";
    let document = argument(|w| {
        w.string(xml).u32(0);
    });
    let volume = client.call(93, &[pool, document].concat()).await.unwrap();
    for (volume, format) in [(&volume, "qcow2"), (&raw, "raw")] {
        let describe = crate::host::number("STORAGE_VOL_GET_XML_DESC");
        let shown = client.call(describe, &[&volume[..], &[0; 4]].concat()).await.unwrap();
        let shown = crate::host::string(&shown);
        assert!(shown.contains(&format!("<format type='{format}'/>")), "{shown}");
        assert!(shown.contains("<capacity unit='bytes'>1048576</capacity>"), "{shown}");
    }
    // As the simulated host has images: a magic number, then the disk.
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut client, b"QFI\xfbdisk").await;
    finish(&mut client).await.unwrap();
    assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, b"QFI\xfbdisk");
    assert_eq!(down(&mut client, &volume, 4, 2, true).await.0, b"di");
    // Nothing is found out about what comes.
    client.call(UPLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    data(&mut client, b"bytes of a disk").await;
    assert!(finish(&mut client).await.unwrap_err().contains("not in qcow2 format"));
    client.call(UPLOAD, &asked(&raw, 0, 0, 0)).await.unwrap();
    data(&mut client, b"QFI\xfbdisk").await;
    finish(&mut client).await.unwrap();
    assert_eq!(down(&mut client, &raw, 0, 8, false).await.0, b"QFI\xfbdisk");
    let part = client.call(UPLOAD, &asked(&volume, 512, 0, 0)).await.unwrap_err();
    assert!(part.0 == Code::OperationUnsupported as i32 && part.1.contains("as a whole"), "{part:?}");
    let much = client.call(UPLOAD, &asked(&volume, 0, 1 << 30, 0)).await.unwrap_err();
    assert_eq!(much.0, Code::InvalidArg as i32, "{much:?}");
    assert_eq!(down(&mut client, &volume, 0, 0, false).await.0, b"QFI\xfbdisk");
    client.call(DOWNLOAD, &asked(&volume, 100, 0, 0)).await.unwrap();
    let frame = client.receive().await;
    assert_eq!((frame.header.kind, frame.header.status), (Kind::Stream, Status::Error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_being_read_does_not_change() {
    let (server, mut client, _) = ready().await;
    let name = argument(|w| {
        w.string("default");
    });
    let pool = client.call(84, &name).await.unwrap();
    // More than lies between the host and a client that does not read.
    let xml = "<volume><name>d2</name><capacity unit='MiB'>64</capacity></volume>";
    let document = argument(|w| {
        w.string(xml).u32(0);
    });
    let volume = client.call(93, &[&pool[..], &document].concat()).await.unwrap();
    let mut reader = server.open("full", "qemu:///system").await;
    reader.call(DOWNLOAD, &asked(&volume, 0, 0, 0)).await.unwrap();
    let plain = [&volume[..], &[0; 4]].concat();
    let destroy = crate::host::number("STORAGE_POOL_DESTROY");
    for (procedure, payload) in [
        (crate::host::number("STORAGE_VOL_DELETE"), &plain),
        (crate::host::number("STORAGE_VOL_WIPE"), &plain),
        (UPLOAD, &asked(&volume, 0, 0, 0)),
        (destroy, &pool),
    ] {
        let refused = client.call(procedure, payload).await.unwrap_err();
        assert_eq!(refused.0, Code::OperationInvalid as i32, "{procedure}: {refused:?}");
        assert!(refused.1.contains("\"d2\" is being read"), "{procedure}: {refused:?}");
    }
    assert_eq!(down(&mut client, &volume, 0, 4, false).await.0, [0; 4], "others may read it, too");
    // Its end is the end of that.
    put(&mut reader, DOWNLOAD, Kind::Stream, Status::Error, vec![]).await;
    let end = std::time::Instant::now() + crate::support::PATIENCE;
    while client.call(165, &plain).await.is_err() {
        assert!(std::time::Instant::now() < end, "the volume can be wiped again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
