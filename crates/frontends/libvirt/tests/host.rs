//! What desktop clients ask of the host and do with what was saved: hardware, interfaces, filters, memory over a stop.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Server, argument};
use karst_engine::{Context, compute::update::UpdateInstance};
use karst_frontend_libvirt::{
    error::Code,
    frame::{Frame, Header, Kind, LXC, Status},
    names::NAMES,
    xdr::{Reader, Typed, Writer},
    xml::read::document,
};
use karst_model::{access::Principal, instance::InstanceKind};
use tokio::io::AsyncWriteExt;

/// Number of a procedure.
pub fn number(name: &str) -> i32 {
    NAMES.iter().position(|n| *n == name).unwrap() as i32 + 1
}

pub async fn ask(
    client: &mut Client,
    procedure: &str,
    write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer,
) -> Result<Vec<u8>, i32> {
    client.call(number(procedure), &arguments(write)).await.map_err(|(code, _)| code)
}

pub fn arguments(write: impl for<'a> FnOnce(&'a mut Writer) -> &'a mut Writer) -> Vec<u8> {
    argument(|w| {
        write(w);
    })
}

/// The names of a list whose objects are strings and what `rest` reads after each.
fn listed(payload: &[u8], rest: impl Fn(&mut Reader<'_>)) -> Vec<String> {
    let mut r = Reader::new(payload);
    let all = r.array(1000, |r| {
        let name = r.string()?;
        rest(r);
        Ok(name)
    });
    let all = all.unwrap();
    assert_eq!(r.u32().unwrap() as usize, all.len());
    r.end().unwrap();
    all
}

pub fn string(payload: &[u8]) -> String {
    Reader::new(payload).string().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hardware_is_listed_by_kind_and_described() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let list = async |client: &mut Client, flags: u32| {
        listed(&ask(client, "CONNECT_LIST_ALL_NODE_DEVICES", |w| w.i32(1).u32(flags)).await.unwrap(), |_| ())
    };
    let all = list(&mut client, 0).await;
    let wanted = ["computer", "pci_0000_00_02_0", "pci_0000_00_1f_2", "usb_1_2", "net_eth0", "block_vda"];
    assert_eq!(all, wanted);
    assert_eq!(list(&mut client, 1 << 4).await, ["net_eth0"]);
    assert_eq!(list(&mut client, 1 << 1 | 1 << 8).await, [wanted[1], wanted[2], "block_vda"]);
    // SCSI hosts, of which there are none; and inactive ones.
    assert!(list(&mut client, 1 << 5).await.is_empty() && list(&mut client, 1 << 30).await.is_empty());
    let count = ask(&mut client, "NODE_NUM_OF_DEVICES", |w| w.optional(Some("pci")).u32(0)).await.unwrap();
    assert_eq!(Reader::new(&count).i32().unwrap(), 2);
    for name in &all {
        let parent = ask(&mut client, "NODE_DEVICE_GET_PARENT", |w| w.string(name)).await.unwrap();
        let parent = Reader::new(&parent).option(|r| r.string()).unwrap();
        assert!(parent.as_ref().map_or(name == "computer", |p| all.contains(p)), "{name}");
        let xml = ask(&mut client, "NODE_DEVICE_GET_XML_DESC", |w| w.string(name).u32(0)).await.unwrap();
        let e = document(&string(&xml)).unwrap();
        let kinds = ask(&mut client, "NODE_DEVICE_LIST_CAPS", |w| w.string(name).i32(8)).await.unwrap();
        let kinds = Reader::new(&kinds).array(8, |r| r.string()).unwrap();
        assert_eq!(e.find("name").unwrap().body(), name);
        assert_eq!(e.find("parent").map(|p| p.body().to_owned()), parent);
        assert_eq!(e.find("capability").unwrap().attribute("type"), Some(kinds[0].as_str()));
    }
    let gone = ask(&mut client, "NODE_DEVICE_LOOKUP_BY_NAME", |w| w.string("pci_0000_ff_00_0")).await;
    assert_eq!(gone, Err(Code::NoNodeDevice as i32));
    let stats = ask(&mut client, "NODE_GET_CPU_STATS", |w| w.i32(-1).i32(4).u32(0)).await.unwrap();
    let mut r = Reader::new(&stats);
    let times = r.array(16, |r| Ok((r.string()?, r.u64()?))).unwrap();
    assert_eq!(times.iter().map(|t| t.0.as_str()).collect::<Vec<_>>(), ["kernel", "user", "idle", "iowait"]);
    assert_eq!((times[2].1, r.i32().unwrap()), (1_000_000_000, 4));
    let none = ask(&mut client, "NODE_GET_CPU_STATS", |w| w.i32(4096).i32(4).u32(0)).await;
    assert_eq!(none, Err(Code::InvalidArg as i32));
    let sysinfo = string(&ask(&mut client, "CONNECT_GET_SYSINFO", |w| w.u32(0)).await.unwrap());
    assert!(sysinfo.contains("<entry name='product'>simulated</entry>"), "{sysinfo}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_are_counted_and_belong_to_the_hosts_administrator() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let free = async |client: &mut Client, sizes: &[u32], start: i32, cells: u32| {
        let asked = ask(client, "NODE_GET_FREE_PAGES", |w| {
            w.array(sizes, |w, size| {
                w.u32(*size);
            })
            .i32(start)
            .u32(cells)
            .u32(0)
        });
        asked.await.map(|answer| {
            let mut r = Reader::new(&answer);
            let counts = r.array(16, |r| r.u64()).unwrap();
            r.end().unwrap();
            counts
        })
    };
    let memory = ask(&mut client, "NODE_GET_FREE_MEMORY", |w| w).await.unwrap();
    let pages = Reader::new(&memory).u64().unwrap() / 4096;
    assert!(pages > 0);
    assert_eq!(free(&mut client, &[4, 2048, 1 << 20], 0, 1).await, Ok(vec![pages, 384, 0]));
    // There is one cell, and the host as a whole.
    assert_eq!(free(&mut client, &[2048], 0, 9).await, Ok(vec![384]));
    assert_eq!(free(&mut client, &[2048], -1, 2).await, Ok(vec![384, 384]));
    let invalid = Err(Code::InvalidArg as i32);
    assert_eq!(free(&mut client, &[64], 0, 1).await, invalid);
    assert_eq!(free(&mut client, &[0], 0, 1).await, invalid);
    assert_eq!(free(&mut client, &[4], 1, 1).await, invalid);
    let capabilities = string(&ask(&mut client, "CONNECT_GET_CAPABILITIES", |w| w).await.unwrap());
    assert!(capabilities.contains("<pages unit='KiB' size='2048'/>"), "{capabilities}");
    let (code, why) = client.call(number("NODE_ALLOC_PAGES"), &[]).await.unwrap_err();
    assert!(code == Code::NoSupport as i32 && why.contains("administrator"), "{why}");

    let parameters = async |client: &mut Client, wanted: i32| {
        let answer = ask(client, "NODE_GET_MEMORY_PARAMETERS", |w| w.i32(wanted).u32(0)).await.unwrap();
        let mut r = Reader::new(&answer);
        // All are numbers, of 4 bytes (2) or of 8 (4).
        let all = r.array(16, |r| {
            let field = r.string()?;
            let value = if r.u32()? == 2 { u64::from(r.u32()?) } else { r.u64()? };
            Ok((field, value))
        });
        let all = all.unwrap();
        let count = r.i32().unwrap();
        r.end().unwrap();
        (all, count)
    };
    assert_eq!(parameters(&mut client, 0).await, (vec![], 8));
    let (all, count) = parameters(&mut client, 8).await;
    assert_eq!((all.len(), count), (8, 8));
    assert_eq!(all[0], ("shm_pages_to_scan".to_owned(), 100));
    assert_eq!(all[6], ("shm_full_scans".to_owned(), 7));
    assert_eq!(all[7], ("shm_merge_across_nodes".to_owned(), 1));
    let set = arguments(|w| w.u32(1).typed("shm_pages_to_scan", &Typed::Uint(50)).u32(0));
    let (code, why) = client.call(number("NODE_SET_MEMORY_PARAMETERS"), &set).await.unwrap_err();
    assert!(code == Code::ConfigUnsupported as i32 && why.contains("shm_pages_to_scan: "), "{why}");
    let mut reader = server.open("ro", "qemu:///system").await;
    let (code, _) = reader.call(number("NODE_SET_MEMORY_PARAMETERS"), &set).await.unwrap_err();
    assert_eq!(code, Code::OperationDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interfaces_are_found_by_name_and_by_address() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let payload = ask(&mut client, "CONNECT_LIST_ALL_INTERFACES", |w| w.i32(1).u32(2)).await.unwrap();
    assert_eq!(listed(&payload, |r| assert_eq!(r.string().unwrap(), "52:54:00:00:00:01")), ["eth0"]);
    let idle = ask(&mut client, "CONNECT_LIST_ALL_INTERFACES", |w| w.i32(1).u32(1)).await.unwrap();
    assert!(listed(&idle, |_| ()).is_empty());
    let eth0 =
        ask(&mut client, "INTERFACE_LOOKUP_BY_MAC_STRING", |w| w.string("52:54:00:00:00:01")).await.unwrap();
    let by_name = ask(&mut client, "INTERFACE_LOOKUP_BY_NAME", |w| w.string("eth0")).await.unwrap();
    assert_eq!(eth0, by_name);
    let xml = client.call(number("INTERFACE_GET_XML_DESC"), &[&eth0[..], &[0; 4]].concat()).await.unwrap();
    assert!(string(&xml).contains("<link speed='1000' state='up'/>"));
    assert_eq!(client.call(number("INTERFACE_IS_ACTIVE"), &eth0).await.unwrap(), [0, 0, 0, 1]);
    let gone = ask(&mut client, "INTERFACE_LOOKUP_BY_NAME", |w| w.string("eth9")).await;
    assert_eq!(gone, Err(Code::NoInterface as i32));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_are_a_fixed_set_and_bindings_are_interfaces_that_run() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let (name, _) = view.instance.identities.iter().find(|(_, i)| i.mac.is_some()).unwrap();
    let mut devices = view.instance.devices.clone();
    let mut keys = view.expanded_devices[name].clone();
    keys.insert("security.mac_filtering".into(), "true".into());
    devices.insert(name.clone(), keys);
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "v1", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let mut client = server.open("full", "qemu:///system").await;
    let filters = ask(&mut client, "CONNECT_LIST_ALL_NWFILTERS", |w| w.i32(1).u32(0)).await.unwrap();
    let filters = listed(&filters, |r| {
        r.uuid().unwrap();
    });
    assert!(filters.contains(&"clean-traffic".to_owned()));
    for name in &filters {
        let found = ask(&mut client, "NWFILTER_LOOKUP_BY_NAME", |w| w.string(name)).await.unwrap();
        let xml =
            client.call(number("NWFILTER_GET_XML_DESC"), &[&found[..], &[0; 4]].concat()).await.unwrap();
        assert!(string(&xml).starts_with(&format!("<filter name='{name}'")));
        let kept = client.call(number("NWFILTER_UNDEFINE"), &found).await.unwrap_err();
        assert_eq!(kept.0, Code::OperationUnsupported as i32);
    }
    let gone = ask(&mut client, "NWFILTER_LOOKUP_BY_NAME", |w| w.string("mine")).await;
    assert_eq!(gone, Err(Code::NoNwfilter as i32));
    let bindings = async |client: &mut Client| {
        let payload = ask(client, "CONNECT_LIST_ALL_NWFILTER_BINDINGS", |w| w.i32(1).u32(0)).await.unwrap();
        listed(&payload, |r| assert_eq!(r.string().unwrap(), "no-mac-spoofing"))
    };
    assert!(bindings(&mut client).await.is_empty(), "it does not run");
    let v1 = client.domain("v1").await;
    client.call(9, &v1).await.unwrap();
    let bound = bindings(&mut client).await;
    assert_eq!(bound.len(), 1);
    let xml = ask(&mut client, "NWFILTER_BINDING_GET_XML_DESC", |w| w.string(&bound[0]).string("").u32(0));
    let xml = string(&xml.await.unwrap());
    assert!(
        xml.contains("<name>v1</name>") && xml.contains("<filterref filter='no-mac-spoofing'/>"),
        "{xml}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn saved_memory_is_described_and_dropped() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut config = view.instance.config.clone();
    config.insert("migration.stateful".into(), "true".into());
    let request = UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config,
        devices: view.instance.devices.clone(),
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let operation = server.engine.instance_update(&admin, "default", "v1", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let with_flags = [&v1[..], &[0; 4]].concat();
    let (xml, remove) = (number("DOMAIN_MANAGED_SAVE_GET_XML_DESC"), number("DOMAIN_MANAGED_SAVE_REMOVE"));
    let has = number("DOMAIN_HAS_MANAGED_SAVE_IMAGE");
    let not_valid = Code::OperationInvalid as i32;
    assert_eq!(client.call(xml, &with_flags).await.unwrap_err().0, not_valid);
    // Nothing to remove is fine.
    client.call(remove, &with_flags).await.unwrap();
    client.call(9, &v1).await.unwrap();
    client.call(number("DOMAIN_MANAGED_SAVE"), &with_flags).await.unwrap();
    assert_eq!(client.call(has, &with_flags).await.unwrap(), [0, 0, 0, 1]);
    assert!(string(&client.call(xml, &with_flags).await.unwrap()).contains("<name>v1</name>"));
    // What the guest does not see of it may be another, and whether it goes on or stands still then.
    let shown = string(&client.call(xml, &with_flags).await.unwrap());
    let define = async |client: &mut Client, document: Option<&str>, flags: u32| {
        let arguments = arguments(|w| w.optional(document).u32(flags));
        client.call(number("DOMAIN_MANAGED_SAVE_DEFINE_XML"), &[&v1[..], &arguments].concat()).await
    };
    assert_eq!(define(&mut client, Some("<domain/>"), 0).await.unwrap_err().0, Code::XmlError as i32);
    let larger = shown.replace("</memory>", "0</memory>");
    let refused = define(&mut client, Some(&larger), 0).await.unwrap_err();
    assert!(refused.0 == Code::ConfigUnsupported as i32 && refused.1.contains("memory: "), "{refused:?}");
    assert_eq!(define(&mut client, None, 2 | 4).await.unwrap_err().0, Code::InvalidArg as i32);
    let restarts = shown.replace("<on_crash>destroy<", "<on_crash>restart<");
    assert_ne!(restarts, shown);
    define(&mut client, Some(&restarts), 4).await.unwrap();
    assert!(string(&client.call(xml, &with_flags).await.unwrap()).contains("<on_crash>restart<"));
    client.call(9, &v1).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 3, "it stands still");
    // As it was, and as it is asked for.
    let saved = |flags: u32| [&v1[..], &flags.to_be_bytes()].concat();
    for (flags, state) in [(0, 3), (2, 1), (4, 3)] {
        client.call(number("DOMAIN_MANAGED_SAVE"), &saved(flags)).await.unwrap();
        client.call(9, &v1).await.unwrap();
        assert_eq!(client.state(&v1).await.0, state, "{flags}");
    }
    client.call(number("DOMAIN_RESUME"), &v1).await.unwrap();
    client.call(number("DOMAIN_MANAGED_SAVE"), &with_flags).await.unwrap();
    client.call(remove, &with_flags).await.unwrap();
    assert_eq!(client.call(has, &with_flags).await.unwrap(), [0, 0, 0, 0]);
    assert!(!server.engine.instance(&admin, "default", "v1").unwrap().instance.stateful);
    client.call(9, &v1).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_belongs_to_the_host_is_refused_with_the_reason() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let no_support = Code::NoSupport as i32;
    for (procedure, word) in [
        ("NODE_DEVICE_DETTACH", "PCI device"),
        ("NODE_DEVICE_DETACH_FLAGS", "PCI device"),
        ("NODE_DEVICE_RE_ATTACH", "PCI device"),
        ("NODE_DEVICE_RESET", "PCI device"),
        ("DOMAIN_GET_PERF_EVENTS", "virDomainGetCPUStats"),
        ("DOMAIN_SET_PERF_EVENTS", "virDomainGetCPUStats"),
    ] {
        let (code, why) = client.call(number(procedure), &[]).await.unwrap_err();
        assert!(code == no_support && why.contains(word), "{procedure}: {why}");
    }
    let set = [&v1[..], &arguments(|w| w.u32(1).u32(1).typed("poll_grow", &Typed::Uint(1)).u32(0))].concat();
    let (code, why) = client.call(number("DOMAIN_SET_IOTHREAD_PARAMS"), &set).await.unwrap_err();
    assert!(code == Code::InvalidArg as i32 && why.contains("cannot find IOThread '1'"), "{why}");
    let set = [&v1[..], &arguments(|w| w.u32(1).u32(0).u32(64))].concat();
    let (code, _) = client.call(number("DOMAIN_SET_IOTHREAD_PARAMS"), &set).await.unwrap_err();
    assert_eq!(code, Code::InvalidArg as i32);
    // Another program of the protocol than `call` speaks.
    let header =
        Header { program: LXC, version: 1, procedure: 1, kind: Kind::Call, serial: 77, status: Status::Ok };
    client.stream.write_all(&Frame::new(header, vec![0; 4]).encode()).await.unwrap();
    let frame = client.receive().await;
    assert_eq!((frame.header.serial, frame.header.status), (77, Status::Error));
    let mut r = Reader::new(&frame.payload);
    let (code, _) = (r.i32().unwrap(), r.i32().unwrap());
    let why = r.option(|r| r.string()).unwrap().unwrap();
    assert!(code == no_support && why.contains("namespaces"), "{why}");
    // The connection goes on.
    client.domain("v1").await;
}
