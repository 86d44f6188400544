//! Devices of the host that machines are given: what documents say of them, what becomes of it.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, dump},
    host::{arguments, number},
    support::{Client, Refused, Server},
};
use karst_engine::Context;
use karst_frontend_libvirt::{error::Code, xdr::Writer, xml::read::document};
use karst_model::access::Principal;

const LIVE: u32 = 1;
const CONFIG: u32 = 2;
const STICK: &str = "<hostdev mode='subsystem' type='usb' managed='yes'><source startupPolicy='optional'><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>";
const KEY: &str = "<hostdev mode='subsystem' type='usb'><source><address bus='14' device='6'/></source><address type='usb' bus='0' port='2'/></hostdev>";
const SEAT: &str = "<input type='evdev'><source dev='/dev/input/event5' grab='all' repeat='on'/></input>";
const MOUSE: &str = "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event3'/></input>";

fn machine(devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>v1</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><memory unit='MiB'>64</memory>\
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

/// Devices of the definition, with the key that tells them apart.
fn devices(server: &Server) -> Vec<String> {
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let all =
        view.instance.devices.iter().filter(|(_, keys)| keys["type"] == "usb" || keys["type"] == "input");
    let which = |name: &String, keys: &std::collections::BTreeMap<String, String>| {
        let key = ["vendorid", "devnum", "source"].iter().find_map(|key| keys.get(*key));
        format!("{name} {}", key.unwrap())
    };
    all.map(|(name, keys)| which(name, keys)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_the_host_are_defined_and_shown_and_never_plugged() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let given = machine(&[STICK, KEY, SEAT, MOUSE].concat());
    define(&mut client, &given).await.unwrap();
    let all = ["hostdev0 1234", "hostdev1 6", "input0 /dev/input/event5", "input1 /dev/input/event3"];
    assert_eq!(devices(&server), all);
    let first = dump(&mut client, "v1", CONFIG).await;
    let elements = |text: &str, name: &'static str| {
        let root = document(text).unwrap();
        root.find("devices").unwrap().all(name).cloned().collect::<Vec<_>>()
    };
    for name in ["hostdev", "input"] {
        assert_eq!(elements(&first, name), elements(&given, name), "{name}");
    }
    define(&mut client, &first).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, first);
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    // They are at a controller, and what of them is on the host is not kept with the machine's memory.
    assert_eq!(view.instance.config.get("hardware.usb").map(String::as_str), Some("piix3-uhci"));
    assert_eq!(view.instance.config.get("migration.stateful").map(String::as_str), Some("false"));
    assert_eq!(view.instance.identities["input1"].slot, "given0");

    call(&mut client, "DOMAIN_CREATE", |w| w).await.unwrap();
    let live = dump(&mut client, "v1", 0).await;
    assert!(live.contains("<alias name='hostdev0'/>") && live.contains("<alias name='given0'/>"), "{live}");
    let refused = call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(STICK).u32(LIVE)).await;
    assert!(refused.unwrap_err().1.contains("fixed at its start"));
    call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(STICK).u32(CONFIG)).await.unwrap();
    assert_eq!(devices(&server), all[1..]);
    assert_eq!(elements(&dump(&mut client, "v1", 0).await, "hostdev").len(), 2, "what runs has it");
    let gone = call(&mut client, "DOMAIN_DETACH_DEVICE_FLAGS", |w| w.string(STICK).u32(CONFIG)).await;
    assert_eq!(gone.unwrap_err().0, Code::DeviceMissing as i32);
    call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(STICK).u32(CONFIG)).await.unwrap();
    let twice = call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(STICK).u32(CONFIG)).await;
    assert!(twice.unwrap_err().1.contains("already"));
    assert_eq!(devices(&server).len(), 4);
    for alias in ["hostdev0", "given0"] {
        call(&mut client, "DOMAIN_DETACH_DEVICE_ALIAS", |w| w.string(alias).u32(CONFIG)).await.unwrap();
    }
    assert_eq!(devices(&server).len(), 2);
    for again in [STICK, MOUSE] {
        call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(again).u32(CONFIG)).await.unwrap();
    }

    for (bad, word) in [
        (
            "<hostdev mode='subsystem' type='pci'><source><address domain='0'/></source></hostdev>",
            "hostdev: devices on PCI",
        ),
        ("<hostdev mode='subsystem' type='mdev' model='vfio-pci'/>", "hostdev: mediated"),
        (&*[STICK, STICK].concat(), "given twice"),
        (&*format!("<controller type='usb' model='none'/>{STICK}"), "no controller"),
    ] {
        let refused = define(&mut client, &machine(bad)).await.unwrap_err();
        assert!(refused.1.contains(word), "{bad}: {}", refused.1);
    }
    assert_eq!(devices(&server).len(), 4, "what is refused changes nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_attached_gets_a_controller() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    define(&mut client, &machine("")).await.unwrap();
    call(&mut client, "DOMAIN_ATTACH_DEVICE_FLAGS", |w| w.string(STICK).u32(CONFIG)).await.unwrap();
    assert_eq!(devices(&server), ["hostdev0 1234"]);
    let text = dump(&mut client, "v1", CONFIG).await;
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert_eq!(view.instance.config.get("hardware.usb").map(String::as_str), Some("piix3-uhci"), "{text}");
    define(&mut client, &text).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_others_are_ports_and_a_filter_is_a_key() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let redirected = "<redirdev bus='usb' type='unix'><source mode='bind' path='/run/redirect'/><protocol type='raw'/></redirdev>";
    let numbers = "<rng model='virtio'><backend model='egd' type='tcp'><source mode='connect' host='127.0.0.1' service='708'/>\
        <protocol type='raw'/></backend></rng>";
    let card = "<smartcard mode='passthrough' type='spicevmc'/>";
    let filter = "<redirfilter><usbdev class='0x08' allow='no'/><usbdev allow='yes'/></redirfilter>";
    let refused = define(&mut client, &machine(card)).await.unwrap_err();
    assert!(refused.1.contains("smartcard: there is no screen of type spice"), "{}", refused.1);
    let all = [redirected, numbers, card, filter, "<graphics type='spice'/>"].concat();
    define(&mut client, &machine(&all)).await.unwrap();
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let port = |name: &str| view.instance.devices[name]["to"].clone();
    assert_eq!([port("redirect0"), port("random0"), port("smartcard0")], ["unix", "tcp", "spice"]);
    let stateful = view.instance.config.get("migration.stateful").map(String::as_str);
    assert_eq!(stateful, Some("false"), "who is at their other ends is not kept with the machine's memory");
    let rules = "0x08:-1:-1:-1:0|-1:-1:-1:-1:1";
    assert_eq!(view.instance.config.get("hardware.usb.filter").map(String::as_str), Some(rules));
    let text = dump(&mut client, "v1", CONFIG).await;
    for name in ["redirfilter", "smartcard"] {
        assert_eq!(text.matches(&format!("<{name}")).count(), 1, "{text}");
    }
    assert!(
        text.contains("<backend model='egd' type='tcp'>") && text.contains("path='/run/redirect'"),
        "{text}"
    );
    define(&mut client, &text).await.unwrap();
    assert_eq!(dump(&mut client, "v1", CONFIG).await, text);
    // A document without them takes them away.
    define(&mut client, &machine("")).await.unwrap();
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert!(!view.instance.devices.contains_key("redirect0"));
    assert_eq!(view.instance.config.get("hardware.usb.filter").filter(|v| !v.is_empty()), None);
}
