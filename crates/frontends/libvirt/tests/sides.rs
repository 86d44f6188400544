//! The run of a domain and its definition: each call changes the sides that its flags name, and the documents show each.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, domain, dump, ready, volume},
    host::{arguments, number},
    support::{Client, Refused},
};
use karst_engine::Context;
use karst_frontend_libvirt::{
    error::Code,
    xdr::{Reader, Typed, Writer},
    xml::machine::read,
};
use karst_model::{access::Principal, storage::VolumeContent};

const LIVE: u32 = 1;
const CONFIG: u32 = 2;
const DISK: &str = "<disk type='block' device='disk'><source dev='/karst/default/d3'/><target dev='vdb' bus='virtio'/></disk>";

async fn call(
    client: &mut Client,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, Refused> {
    let v1 = client.domain("v1").await;
    client.call(number(procedure), &[v1, arguments(write)].concat()).await
}

/// How often the document shows a disk, as it runs and as it is defined.
async fn shown(client: &mut Client, target: &str) -> (usize, usize) {
    let what = format!("dev='{target}'");
    let (live, later) = (dump(client, "v1", 0).await, dump(client, "v1", CONFIG).await);
    (live.matches(&what).count(), later.matches(&what).count())
}

async fn again(client: &mut Client) {
    call(client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    call(client, "DOMAIN_CREATE", |w| w).await.unwrap();
}

/// The calls of virt-manager in their order: it adds live, then to the definition that it reads; it removes from the definition,
/// then live.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_added_live_and_then_defined_and_removed_the_other_way_round() {
    let (server, mut client) = ready().await;
    volume(&server, "d3", VolumeContent::Block).await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let before = dump(&mut client, "v1", CONFIG).await;

    call(&mut client, "DOMAIN_ATTACH_DEVICE", |w| w.string(DISK)).await.unwrap();
    assert_eq!(shown(&mut client, "vdb").await, (1, 0));
    assert_eq!(dump(&mut client, "v1", CONFIG).await, before, "the definition has not changed");
    let twice = call(&mut client, "DOMAIN_ATTACH_DEVICE", |w| w.string(DISK)).await.unwrap_err();
    assert!(twice.1.contains("target vdb already exists"), "{twice:?}");
    define(&mut client, &before.replacen("<interface ", &format!("{DISK}<interface "), 1)).await.unwrap();
    assert_eq!(shown(&mut client, "vdb").await, (1, 1));
    let admin = Context::new(Principal::system());
    assert_eq!(
        server
            .engine
            .instance_pending(&admin, "default", "v1")
            .unwrap()
            .iter()
            // Which of its disks are tried for a system the firmware asks at the next start.
            .find(|p| p.key.contains("vdb") && p.key != "devices.vdb.boot.priority"),
        None
    );

    define(&mut client, &before).await.unwrap();
    assert_eq!(shown(&mut client, "vdb").await, (1, 0));
    call(&mut client, "DOMAIN_DETACH_DEVICE", |w| w.string(DISK)).await.unwrap();
    assert_eq!(shown(&mut client, "vdb").await, (0, 0));
    let gone = call(&mut client, "DOMAIN_DETACH_DEVICE", |w| w.string(DISK)).await.unwrap_err();
    assert_eq!(gone.0, Code::DeviceMissing as i32);
    let free = server.engine.volume_delete(&admin, "default", "default", "d3").await.unwrap();
    assert_eq!(free.ended().await.error, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_live_only_ends_with_the_run() {
    let (server, mut client) = ready().await;
    volume(&server, "d3", VolumeContent::Block).await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(DISK).u32(LIVE)).await.unwrap();
    let second = "<disk type='volume' device='disk'><target dev='sdc' bus='scsi'/></disk>";
    call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(second).u32(LIVE)).await.unwrap();
    assert_eq!((shown(&mut client, "vdb").await, shown(&mut client, "sdc").await), ((1, 0), (0, 1)));
    // In use as any other: its volume stays, and its figures are told.
    let admin = Context::new(Principal::system());
    let used = server.engine.volume_delete(&admin, "default", "default", "d3").await.map(drop).unwrap_err();
    assert!(used.message.contains("is used by"), "{used}");
    call(&mut client, "DOMAIN_BLOCK_STATS", |w| w.string("vdb")).await.unwrap();
    assert!(call(&mut client, "DOMAIN_BLOCK_STATS", |w| w.string("sdc")).await.is_err());
    // Another change of either side leaves what the other has.
    let other = DISK.replace("d3", "d2").replace("vdb", "vdc");
    assert!(call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(&other).u32(CONFIG)).await.is_err());
    let memory = async |client: &mut Client, flags: u32| {
        let text = dump(client, "v1", flags).await;
        read::machine(&text).map(|m| m.current).unwrap()
    };
    let first = memory(&mut client, 0).await;
    call(&mut client, "DOMAIN_SET_MEMORY_FLAGS", |w| w.u64(65_536).u32(CONFIG)).await.unwrap();
    assert_eq!((shown(&mut client, "vdb").await, shown(&mut client, "sdc").await), ((1, 0), (0, 1)));
    assert_eq!((memory(&mut client, 0).await, memory(&mut client, CONFIG).await), (first, 65_536));
    again(&mut client).await;
    assert_eq!((shown(&mut client, "vdb").await, shown(&mut client, "sdc").await), ((0, 0), (1, 1)));
    assert_eq!(memory(&mut client, 0).await, 65_536);
    let free = server.engine.volume_delete(&admin, "default", "default", "d3").await.unwrap();
    assert_eq!(free.ended().await.error, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rates_links_and_shares_are_of_one_side_or_both() {
    let (_server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let has =
        async |client: &mut Client, flags: u32, text: &str| dump(client, "v1", flags).await.contains(text);

    let rate = Typed::Ullong(5_000_000);
    call(&mut client, "DOMAIN_SET_BLOCK_IO_TUNE", |w| {
        w.string("vda").u32(1).typed("read_bytes_sec", &rate).u32(LIVE)
    })
    .await
    .unwrap();
    let told = "<read_bytes_sec>5000000</read_bytes_sec>";
    assert!(has(&mut client, 0, told).await && !has(&mut client, CONFIG, told).await);
    let tuned = async |client: &mut Client, flags: u32| {
        let answer =
            call(client, "DOMAIN_GET_BLOCK_IO_TUNE", |w| w.u32(1).string("vda").i32(32).u32(flags)).await;
        let answer = answer.unwrap();
        let mut r = Reader::new(&answer);
        let all = r.array(64, |r| {
            let field = r.string()?;
            let number = match r.u32()? {
                4 => r.u64()?,
                7 => r.string().map(|_| 0)?,
                _ => u64::from(r.u32()?),
            };
            Ok((field, number))
        });
        all.unwrap().into_iter().find(|(field, _)| field == "read_bytes_sec").unwrap().1
    };
    assert_eq!((tuned(&mut client, LIVE).await, tuned(&mut client, CONFIG).await), (5_000_000, 0));

    let nic = "<interface type='network'><mac address='52:54:00:11:22:33'/><source network='karstbr0'/><model type='e1000e'/><link state='down'/></interface>";
    call(&mut client, "DOMAIN_UPDATE_DEVICE_FLAGS", |w| w.string(nic).u32(LIVE)).await.unwrap();
    let down = "<link state='down'/>";
    assert!(has(&mut client, 0, down).await && !has(&mut client, CONFIG, down).await);
    call(&mut client, "DOMAIN_UPDATE_DEVICE_FLAGS", |w| w.string(nic).u32(LIVE | CONFIG)).await.unwrap();
    assert!(has(&mut client, 0, down).await && has(&mut client, CONFIG, down).await);

    let (shares, none) = (Typed::Ullong(2048), Typed::Ullong(512));
    for (value, flags) in [(&shares, LIVE), (&none, CONFIG)] {
        call(&mut client, "DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS", |w| {
            w.u32(1).typed("cpu_shares", value).u32(flags)
        })
        .await
        .unwrap();
    }
    assert!(has(&mut client, 0, "<shares>2048</shares>").await);
    assert!(has(&mut client, CONFIG, "<shares>512</shares>").await);
    again(&mut client).await;
    assert!(has(&mut client, 0, "<shares>512</shares>").await && !has(&mut client, 0, told).await);

    // What no running guest can have changes nothing when it is asked of the run alone.
    let defined = dump(&mut client, "v1", CONFIG).await;
    let more = call(&mut client, "DOMAIN_SET_MEMORY_FLAGS", |w| w.u64(524_288).u32(LIVE)).await;
    let refused = more.unwrap_err();
    assert!(refused.0 == Code::InvalidArg as i32 && refused.1.contains("max memory"), "{refused:?}");
    assert_eq!(dump(&mut client, "v1", CONFIG).await, defined);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transient_domain_has_a_run_only() {
    let (server, mut client) = ready().await;
    volume(&server, "d3", VolumeContent::Block).await;
    let create = arguments(|w| w.string(&domain("v1", &[])).u32(0));
    client.call(number("DOMAIN_CREATE_XML"), &create).await.unwrap();
    for flags in [CONFIG, LIVE | CONFIG] {
        let refused =
            call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(DISK).u32(flags)).await.unwrap_err();
        assert!(
            refused.0 == Code::OperationInvalid as i32 && refused.1.contains("transient"),
            "{flags}: {refused:?}"
        );
    }
    call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(DISK).u32(0)).await.unwrap();
    assert_eq!(shown(&mut client, "vdb").await.0, 1);
    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    let admin = Context::new(Principal::system());
    let free = server.engine.volume_delete(&admin, "default", "default", "d3").await.unwrap();
    assert_eq!(free.ended().await.error, None);
}
