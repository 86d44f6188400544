//! Directories that machines share with their host, and those that containers have: what documents say of them, what becomes of it.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, dump},
    host::{arguments, number},
    support::{Client, Refused, Server},
};
use karst_engine::{Context, compute::update::UpdateInstance};
use karst_frontend_libvirt::{error::Code, xdr::Writer, xml::read::document};
use karst_model::{access::Principal, device::Devices, instance::InstanceKind};

const LIVE: u32 = 1;
const CONFIG: u32 = 2;
const SHARED: &str = "<memoryBacking><access mode='shared'/></memoryBacking>";
const FIRST: &str = "<filesystem type='mount' accessmode='mapped' fmode='0640'><driver type='path' wrpolicy='immediate'/>\
    <source dir='/srv/first'/><target dir='/import/first'/><readonly/></filesystem>";
const SECOND: &str = "<filesystem type='mount' accessmode='passthrough'><driver type='virtiofs' queue='512'/>\
    <binary path='/usr/libexec/virtiofsd' xattr='on'><cache mode='always'/></binary><source dir='/srv/second'/><target dir='second'/></filesystem>";
const THIRD: &str = "<filesystem><source dir='/srv/third'/><target dir='third'/></filesystem>";

fn machine(more: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>v1</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><memory unit='MiB'>64</memory>{more}\
         <os><type machine='q35'>hvm</type></os><devices>{devices}</devices></domain>"
    )
}

async fn call(
    client: &mut Client,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, Refused> {
    let v1 = client.domain("v1").await;
    client.call(number(procedure), &[v1, arguments(write)].concat()).await
}

/// A key of a device of the definition.
fn key(server: &Server, device: &str, key: &str) -> Option<String> {
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    view.instance.devices.get(device)?.get(key).cloned()
}

fn stateful(server: &Server) -> Option<String> {
    let admin = Context::new(Principal::system());
    server
        .engine
        .instance(&admin, "default", "v1")
        .unwrap()
        .instance
        .config
        .get("migration.stateful")
        .cloned()
}

async fn change(server: &Server, edit: impl FnOnce(&mut Devices)) {
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut devices = view.instance.devices.clone();
    edit(&mut devices);
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let changed = server.engine.instance_update(&admin, "default", "v1", request).await.unwrap();
    assert_eq!(changed.ended().await.error, None);
}

fn device(keys: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn targets(text: &str) -> Vec<String> {
    let root = document(text).unwrap();
    let devices = root.find("devices").unwrap();
    let of =
        devices.all("filesystem").map(|e| e.find("target").unwrap().attribute("dir").unwrap().to_owned());
    of.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_become_devices_that_the_guest_mounts_itself() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    // Who serves a directory reads and writes in the machine's memory.
    let refused = define(&mut client, &machine("", SECOND)).await.unwrap_err();
    assert_eq!(refused.0, Code::ConfigUnsupported as i32);
    assert!(refused.1.contains("'virtiofs' requires shared memory"), "{}", refused.1);

    define(&mut client, &machine(SHARED, &[FIRST, SECOND].concat())).await.unwrap();
    let of = |name: &str, what: &str| key(&server, name, what);
    assert_eq!(of("filesystem0", "tag").as_deref(), Some("/import/first"));
    assert_eq!(of("filesystem0", "source").as_deref(), Some("/srv/first"));
    assert_eq!((of("filesystem0", "path"), of("filesystem0", "io.bus").as_deref()), (None, Some("9p")));
    assert_eq!(of("filesystem0", "share.options").as_deref(), Some("immediate,access=mapped,file-mode=0640"));
    assert_eq!(of("filesystem1", "share.options").as_deref(), Some("queue-size=512,cache=always"));
    assert_eq!(stateful(&server).as_deref(), Some("false"), "their memory cannot be kept");

    // As it was written, and the same again; of what runs it is told where it is.
    let first = dump(&mut client, "v1", CONFIG).await;
    let given = document(&machine(SHARED, &[FIRST, SECOND].concat())).unwrap();
    let shown = document(&first).unwrap();
    let all = |root: &karst_frontend_libvirt::xml::Element| {
        root.find("devices").unwrap().all("filesystem").cloned().collect::<Vec<_>>()
    };
    assert_eq!(all(&shown), all(&given));
    define(&mut client, &first).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, first);
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let live = dump(&mut client, "v1", 0).await;
    assert!(live.contains("<alias name='fs0'/>") && live.contains("<alias name='fs1'/>"), "{live}");

    // What runs keeps what it has; the definition gets one more, and loses one.
    for flags in [LIVE, LIVE | CONFIG] {
        let e = call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(THIRD).u32(flags)).await;
        assert!(e.unwrap_err().1.contains("fixed at its start"), "{flags}");
    }
    call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(THIRD).u32(CONFIG)).await.unwrap();
    let twice = call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(THIRD).u32(CONFIG)).await;
    assert!(twice.unwrap_err().1.contains("target third already exists"));
    call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(FIRST).u32(CONFIG)).await.unwrap();
    assert_eq!(targets(&dump(&mut client, "v1", 0).await), ["/import/first", "second"]);
    assert_eq!(targets(&dump(&mut client, "v1", CONFIG).await), ["second", "third"]);
    let gone = call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(FIRST).u32(CONFIG)).await;
    assert_eq!(gone.unwrap_err().0, Code::DeviceMissing as i32);
    let other = call(&mut client, "DOMAIN_UPDATE_DEVICE_FLAGS", |w| w.string(THIRD).u32(CONFIG)).await;
    assert!(other.unwrap_err().1.contains("none is changed"));
    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();
    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    assert_eq!(targets(&dump(&mut client, "v1", 0).await), ["second", "third"]);
    call(&mut client, "DOMAIN_DESTROY", |w| w).await.unwrap();

    // Without any its memory can be kept again.
    define(&mut client, &machine("", "")).await.unwrap();
    assert_eq!(targets(&dump(&mut client, "v1", CONFIG).await), [""; 0]);
    assert_eq!(stateful(&server).as_deref(), Some("true"));
    for (bad, word) in [
        ("<filesystem type='file'><source file='/a'/><target dir='a'/></filesystem>", "filesystem"),
        ("<filesystem><source dir='/a'/><target dir='config'/></filesystem>", "filesystem target"),
        (&*[THIRD, THIRD].concat(), "duplicated"),
    ] {
        let refused = define(&mut client, &machine("", bad)).await.unwrap_err();
        assert!(refused.1.contains(word), "{bad}: {}", refused.1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_that_no_document_said_are_shown_and_stay_where_they_are() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let disk = |more: &[(&str, &str)]| {
        let all: Vec<_> = [("type", "disk"), ("source", "/srv/data")].iter().chain(more).copied().collect();
        device(&all)
    };
    change(&server, |devices| {
        devices.insert("data".into(), disk(&[("path", "/mnt/data")]));
        devices.insert("fast".into(), disk(&[("path", "/mnt/fast"), ("io.bus", "virtiofs")]));
    })
    .await;
    let mut client = server.open("full", "qemu:///system").await;
    let text = dump(&mut client, "v1", CONFIG).await;
    assert_eq!(targets(&text), ["data", "fast"], "{text}");
    assert!(text.contains("<access mode='shared'/>"), "what is served needs it: {text}");
    // Its own document changes nothing, and one without it takes it away.
    define(&mut client, &text).await.unwrap();
    assert_eq!(key(&server, "data", "path").as_deref(), Some("/mnt/data"));
    assert_eq!((key(&server, "data", "tag"), key(&server, "data", "io.bus")), (None, None));
    let root = document(&text).unwrap();
    let fast = root.find("devices").unwrap().all("filesystem").nth(1).unwrap().document();
    call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(&fast).u32(CONFIG)).await.unwrap();
    assert_eq!(key(&server, "fast", "type"), None);
    assert_eq!(key(&server, "data", "path").as_deref(), Some("/mnt/data"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_container_has_mounted_is_shown() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::Container, false).await;
    change(&server, |devices| {
        let host = [("type", "disk"), ("source", "/srv/data"), ("path", "/mnt"), ("readonly", "true")];
        devices.insert("data".into(), device(&host));
        let memory = [("type", "disk"), ("source", "tmpfs:"), ("path", "/run/x"), ("size", "2MiB")];
        devices.insert("memory".into(), device(&memory));
    })
    .await;
    let mut client = server.open("full", "lxc:///system").await;
    let text = dump(&mut client, "v1", CONFIG).await;
    assert_eq!(targets(&text), ["/", "/mnt", "/run/x"], "{text}");
    let root = document(&text).unwrap();
    let all: Vec<_> = root.find("devices").unwrap().all("filesystem").collect();
    let of = |n: usize, name: &str| all[n].find("source").unwrap().attribute(name).map(str::to_owned);
    assert_eq!(all[1].attribute("type"), Some("mount"));
    assert_eq!(all[1].attribute("accessmode"), Some("passthrough"), "its owners are not shifted");
    assert!(all[1].find("readonly").is_some());
    assert_eq!(of(1, "dir").as_deref(), Some("/srv/data"));
    assert_eq!((of(2, "usage").as_deref(), of(2, "units").as_deref()), (Some("2048"), Some("KiB")));
    // A tag is a machine's.
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut devices = view.instance.devices.clone();
    devices.insert(
        "tagged".into(),
        device(&[("type", "disk"), ("source", "/srv"), ("path", "/t"), ("tag", "t")]),
    );
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let refused =
        server.engine.instance_update(&admin, "default", "v1", request).await.map(drop).unwrap_err();
    assert_eq!(refused.field.as_deref(), Some("devices.tagged.tag"), "{refused}");
}
