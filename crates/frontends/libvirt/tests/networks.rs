//! Networks by XML: defined, changed, shown, removed; reserved addresses; ports; and what is refused leaves nothing.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Refused, Server, argument};
use karst_engine::Context;
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{access::Principal, instance::InstanceKind};

const UUID: &str = "3a1b0e4c-5d0d-4a0f-9d5d-0f3f6f2b1c22";

fn document(inner: &str) -> String {
    format!("<network><name>n1</name><uuid>{UUID}</uuid>{inner}</network>")
}

async fn define(client: &mut Client, xml: &str) -> Result<Vec<u8>, Refused> {
    let payload = argument(|w| {
        w.string(xml).u32(0);
    });
    client.call(432, &payload).await
}

async fn network(client: &mut Client, name: &str) -> Vec<u8> {
    let payload = argument(|w| {
        w.string(name);
    });
    client.call(46, &payload).await.unwrap()
}

async fn dump(client: &mut Client, network: &[u8]) -> String {
    let payload = client.call(43, &[network, &[0; 4]].concat()).await.unwrap();
    Reader::new(&payload).string().unwrap()
}

async fn update(
    client: &mut Client,
    network: &[u8],
    command: u32,
    section: u32,
    xml: &str,
) -> Result<(), Refused> {
    let rest = argument(|w| {
        w.u32(command).u32(section).i32(-1).string(xml).u32(3);
    });
    client.call(291, &[network, &rest].concat()).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_is_its_document() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let ip =
        "<ip address='10.99.8.1' prefix='24'><dhcp><range start='10.99.8.20' end='10.99.8.30'/></dhcp></ip>";
    let n1 = define(&mut client, &document(&format!("<forward mode='open'/><mtu size='1400'/>{ip}")))
        .await
        .unwrap();
    let shown = dump(&mut client, &n1).await;
    for part in
        ["<forward mode='open'/>", "<mtu size='1400'/>", UUID, "end='10.99.8.30'", "netmask='255.255.255.0'"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(define(&mut client, &shown).await.unwrap(), n1, "its own document changes nothing");
    assert_eq!(dump(&mut client, &n1).await, shown);
    // What the document does not say is kept, what it says no more goes.
    let admin = Context::new(Principal::system());
    let config = server.engine.network(&admin, "default", "n1").unwrap().config.clone();
    assert_eq!(
        (config["ipv4.address"].as_str(), config["ipv4.firewall"].as_str()),
        ("10.99.8.1/24", "false")
    );
    define(&mut client, &document(&format!("<forward mode='nat'/>{ip}"))).await.unwrap();
    let config = server.engine.network(&admin, "default", "n1").unwrap().config.clone();
    assert!(config["ipv4.nat"] == "true" && !config.contains_key("bridge.mtu"), "{config:?}");
    // Another UUID, another kind.
    let other = document(ip).replace("3a1b", "3a1c");
    assert!(define(&mut client, &other).await.unwrap_err().1.contains("already exists with uuid"));
    let bridge = document("<forward mode='bridge'><interface dev='eth0'/></forward>");
    assert_eq!(define(&mut client, &bridge).await.unwrap_err().0, Code::ConfigUnsupported as i32);
    let renamed = document(ip).replace(">n1<", ">n2<");
    assert!(define(&mut client, &renamed).await.unwrap_err().1.contains("'n1' is already defined with uuid"));
    client.call(39, &n1).await.unwrap();
    // Ranges.
    let range = "<range start='10.99.8.40' end='10.99.8.50'/>";
    update(&mut client, &n1, 3, 5, range).await.unwrap();
    assert!(dump(&mut client, &n1).await.contains(range));
    assert!(update(&mut client, &n1, 3, 5, range).await.unwrap_err().1.contains("existing dhcp range"));
    update(&mut client, &n1, 2, 5, range).await.unwrap();
    assert!(!dump(&mut client, &n1).await.contains(range));
    for (command, section, code) in [
        (2, 5, Code::OperationInvalid),
        (3, 6, Code::OperationUnsupported),
        (3, 10, Code::XmlError),
        (9, 5, Code::InvalidArg),
    ] {
        assert_eq!(update(&mut client, &n1, command, section, range).await.unwrap_err().0, code as i32);
    }
    // Stopped and removed.
    client.call(42, &n1).await.unwrap();
    client.call(49, &n1).await.unwrap();
    assert_eq!(client.call(49, &n1).await.unwrap_err().0, Code::NoNetwork as i32);
    // Read-only.
    let mut reader = server.open("ro", "qemu:///system").await;
    assert_eq!(define(&mut reader, &document(ip)).await.unwrap_err().0, Code::OperationDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_are_reserved_for_interfaces_that_are_there() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let admin = Context::new(Principal::system());
    let mut client = server.open("full", "qemu:///system").await;
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mac = view.instance.identities.values().find_map(|i| i.mac.clone()).unwrap();
    let name = server.engine.networks(&admin, "default").unwrap()[0].name.to_string();
    let subnet = server.engine.network(&admin, "default", &name).unwrap().bridge().unwrap().ipv4.unwrap();
    let [a, b, c, _] = subnet.addr().octets();
    let network = network(&mut client, &name).await;
    let host = |n: u8| format!("<host mac='{mac}' ip='{a}.{b}.{c}.{n}'/>");
    assert!(update(&mut client, &network, 1, 4, &host(50)).await.unwrap_err().1.contains("couldn't locate"));
    update(&mut client, &network, 3, 4, &host(50)).await.unwrap();
    assert!(dump(&mut client, &network).await.contains(&host(50)));
    assert!(
        update(&mut client, &network, 3, 4, &host(51)).await.unwrap_err().1.contains("existing dhcp host")
    );
    update(&mut client, &network, 1, 4, &host(51)).await.unwrap();
    let shown = dump(&mut client, &network).await;
    assert!(shown.contains(&host(51)) && !shown.contains(&host(50)));
    // The document without it gives it back.
    define(&mut client, &shown.replace(&host(51), "")).await.unwrap();
    assert!(!dump(&mut client, &network).await.contains("<host"));
    // One that nobody has yet is the network's own.
    let nobody = "<host mac='52:54:00:00:00:99' ip='192.0.2.9'/>";
    let refused = update(&mut client, &network, 3, 4, nobody).await.unwrap_err();
    assert!(refused.0 == Code::InvalidArg as i32 && refused.1.contains("ipv4.dhcp.hosts"), "{refused:?}");
    let kept = |n: u8| format!("<host mac='52:54:00:00:00:99' name='later' ip='{a}.{b}.{c}.{n}'/>");
    update(&mut client, &network, 3, 4, &kept(60)).await.unwrap();
    assert!(
        update(&mut client, &network, 3, 4, &kept(61)).await.unwrap_err().1.contains("existing dhcp host")
    );
    update(&mut client, &network, 1, 4, &kept(61)).await.unwrap();
    let shown = dump(&mut client, &network).await;
    assert!(shown.contains(&kept(61)) && !shown.contains(&kept(60)), "{shown}");
    let id = server.engine.network(&admin, "default", &name).unwrap().id;
    let told = server.host.network_hosts(id);
    assert!(told.iter().any(|h| h.mac == "52:54:00:00:00:99" && h.hostname == "later"), "{told:?}");
    update(&mut client, &network, 2, 4, "<host name='later'/>").await.unwrap();
    assert!(!dump(&mut client, &network).await.contains("later"));
    assert!(
        update(&mut client, &network, 2, 4, "<host name='later'/>")
            .await
            .unwrap_err()
            .1
            .contains("couldn't locate a matching")
    );
    // Its port.
    let rest = argument(|w| {
        w.i32(1).u32(0);
    });
    let payload = client.call(404, &[network.clone(), rest].concat()).await.unwrap();
    let mut r = Reader::new(&payload);
    let ports = r.array(10, |r| Ok((r.string()?, r.uuid()?, r.uuid()?))).unwrap();
    assert_eq!(ports.len(), 1);
    let port = [
        network.clone(),
        argument(|w| {
            w.uuid(ports[0].2);
        }),
    ]
    .concat();
    let payload = client.call(409, &[port, vec![0; 4]].concat()).await.unwrap();
    let xml = Reader::new(&payload).string().unwrap();
    assert!(xml.contains("<name>v1</name>") && xml.contains(&mac), "{xml}");
    let unknown = [
        network,
        argument(|w| {
            w.uuid(uuid::Uuid::nil());
        }),
    ];
    assert_eq!(client.call(405, &unknown.concat()).await.unwrap_err().0, Code::NoNetworkPort as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_answered_as_they_are_said() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let inner = "<domain name='lan.test'/><dns><forwarder domain='example.org' addr='192.0.2.54'/>\
        <txt name='spf' value='v=spf1 -all'/><srv service='ldap' protocol='tcp' target='ldap.example.org' port='389'/>\
        <host ip='10.99.8.5'><hostname>www</hostname></host></dns><ip address='10.99.8.1' prefix='24'/>";
    let n1 = define(&mut client, &document(inner)).await.unwrap();
    let shown = dump(&mut client, &n1).await;
    for part in [
        "<domain name='lan.test'/>",
        "<forwarder domain='example.org' addr='192.0.2.54'/>",
        "<txt name='spf' value='v=spf1 -all'/>",
        "<srv service='ldap' protocol='tcp' target='ldap.example.org' port='389'/>",
        "<host ip='10.99.8.5'>",
        "<hostname>www</hostname>",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, &n1).await, shown, "its own document changes nothing");
    client.call(39, &n1).await.unwrap();
    let (host, txt, srv) = (10, 11, 12);
    let two = "<host ip='10.99.8.6'><hostname>www</hostname></host>";
    update(&mut client, &n1, 3, host, two).await.unwrap();
    update(&mut client, &n1, 3, txt, "<txt name='b' value='c'/>").await.unwrap();
    update(&mut client, &n1, 4, srv, "<srv service='sip' protocol='udp'/>").await.unwrap();
    let shown = dump(&mut client, &n1).await;
    for part in ["<host ip='10.99.8.6'>", "<txt name='b' value='c'/>", "<srv service='sip' protocol='udp'/>"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let admin = Context::new(Principal::system());
    let id = server.engine.network(&admin, "default", "n1").unwrap().id;
    let names = server.host.network_spec(id).unwrap().spec.names;
    assert_eq!((names.hosts.len(), names.texts.len(), names.services[0].service.as_str()), (2, 2, "sip"));
    assert!(names.beyond, "localOnly is not said");
    let invalid = Code::OperationInvalid as i32;
    for (command, section, xml, code, says) in [
        (3, host, two, invalid, "already at least one DNS HOST record"),
        (2, host, "<host><hostname>www</hostname></host>", invalid, "multiple matching DNS HOST records"),
        (2, host, "<host ip='10.99.8.7'/>", invalid, "couldn't locate a matching DNS HOST"),
        (1, host, two, Code::OperationUnsupported as i32, "cannot be modified, only added or deleted"),
        (3, host, "<txt name='x' value='y'/>", Code::XmlError as i32, "expecting <host>"),
        (3, txt, "<txt name='b' value='d'/>", invalid, "already a DNS TXT record with name 'b'"),
        (2, txt, "<txt name='x'/>", invalid, "couldn't locate a matching DNS TXT"),
        (3, txt, "<txt name='x' value='a&#10;dhcp-script=/x'/>", Code::XmlError as i32, "characters"),
        (3, srv, "<srv service='sip' protocol='udp'/>", invalid, "already at least one DNS SRV record"),
        (2, srv, "<srv service='x' protocol='udp'/>", invalid, "couldn't locate a matching DNS SRV"),
    ] {
        let refused = update(&mut client, &n1, command, section, xml).await.unwrap_err();
        assert!(refused.0 == code && refused.1.contains(says), "{xml}: {refused:?}");
    }
    update(&mut client, &n1, 2, host, "<host ip='10.99.8.6'/>").await.unwrap();
    update(&mut client, &n1, 2, txt, "<txt name='b'/>").await.unwrap();
    update(&mut client, &n1, 2, srv, "<srv protocol='udp'/>").await.unwrap();
    let names = server.host.network_spec(id).unwrap().spec.names;
    assert_eq!((names.hosts.len(), names.texts.len(), names.services.len()), (1, 1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ways_out_and_subnets() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let admin = Context::new(Principal::system());
    let inner = "<forward mode='nat'><nat><address start='192.0.2.1' end='192.0.2.9'/><port start='500' end='1000'/></nat></forward>\
        <bridge name='virbr7' stp='on' delay='3'/><mac address='52:54:00:00:00:07'/>\
        <ip address='10.99.8.1' prefix='24'><dhcp><range start='10.99.8.20' end='10.99.8.30'/></dhcp></ip>\
        <ip address='10.99.9.1' prefix='24'/>";
    let n1 = define(&mut client, &document(inner)).await.unwrap();
    let shown = dump(&mut client, &n1).await;
    for part in [
        "<address start='192.0.2.1' end='192.0.2.9'/>",
        "<port start='500' end='1000'/>",
        "<bridge name='virbr7' stp='on' delay='3'/>",
        "<mac address='52:54:00:00:00:07'/>",
        "<ip address='10.99.9.1' netmask='255.255.255.0'",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    define(&mut client, &shown).await.unwrap();
    assert_eq!(dump(&mut client, &n1).await, shown, "its own document changes nothing");
    client.call(39, &n1).await.unwrap();
    let payload = client.call(45, &n1).await.unwrap();
    assert_eq!(Reader::new(&payload).string().unwrap(), "virbr7");
    let id = server.engine.network(&admin, "default", "n1").unwrap().id;
    let spec = server.host.network_spec(id).unwrap();
    assert_eq!(
        (spec.bridge.as_str(), spec.spec.own4().count(), spec.spec.nat_ports),
        ("virbr7", 2, Some((500, 1000)))
    );
    // Its bridge's name is taken, and its second subnet.
    let other = |inner: &str| format!("<network><name>n2</name>{inner}</network>");
    for taken in ["<bridge name='virbr7'/>", "<bridge name='n1'/>", "<ip address='10.99.9.9' prefix='25'/>"] {
        let refused = define(&mut client, &other(taken)).await.unwrap_err();
        assert_eq!(refused.0, Code::OperationInvalid as i32, "{taken}: {refused:?}");
    }
    for procedure in [42, 49] {
        client.call(procedure, &n1).await.unwrap();
    }
    // What the host has: an interface that it grants, shared, and one as a bridge.
    let vepa =
        other("<forward dev='granted0' mode='vepa'><interface dev='granted0'/></forward><mtu size='1400'/>");
    let n2 = define(&mut client, &vepa).await.unwrap();
    let shown = dump(&mut client, &n2).await;
    assert!(
        shown.contains("<forward dev='granted0' mode='vepa'>") && shown.contains("size='1400'"),
        "{shown}"
    );
    client.call(39, &n2).await.unwrap();
    for procedure in [42, 49] {
        client.call(procedure, &n2).await.unwrap();
    }
    let n2 = define(&mut client, &other("<forward mode='bridge'/><bridge name='granted0'/>")).await.unwrap();
    let shown = dump(&mut client, &n2).await;
    assert!(
        shown.contains("<forward mode='bridge'/>") && shown.contains("<bridge name='granted0'/>"),
        "{shown}"
    );
    let payload = client.call(45, &n2).await.unwrap();
    assert_eq!(Reader::new(&payload).string().unwrap(), "granted0");
    client.call(49, &n2).await.unwrap();
    let ungranted = other("<forward mode='bridge'/><bridge name='br9'/>");
    assert_eq!(define(&mut client, &ungranted).await.unwrap_err().0, Code::AccessDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_of_ports_have_rates() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let admin = Context::new(Principal::system());
    let mut client = server.open("full", "qemu:///system").await;
    let name = server.engine.networks(&admin, "default").unwrap()[0].name.to_string();
    let network = network(&mut client, &name).await;
    let portgroup = 9;
    let slow =
        "<portgroup name='slow' default='yes'><bandwidth><outbound average='64'/></bandwidth></portgroup>";
    let fast = "<portgroup name='fast'><bandwidth><inbound average='1000' peak='5000' burst='5120'/></bandwidth></portgroup>";
    update(&mut client, &network, 3, portgroup, slow).await.unwrap();
    update(&mut client, &network, 3, portgroup, fast).await.unwrap();
    let shown = dump(&mut client, &network).await;
    for part in
        ["<portgroup name='slow' default='yes'>", "<inbound average='1000' peak='5000' burst='5120'/>"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let invalid = Code::OperationInvalid as i32;
    for (command, xml, code, says) in [
        (3, slow, invalid, "existing portgroup entry"),
        (1, "<portgroup name='x'/>", invalid, "couldn't find a portgroup entry"),
        (3, "<portgroup name='x' default='yes'/>", invalid, "Only one default is allowed"),
        (3, "<portgroup name='x'><vlan/></portgroup>", Code::ConfigUnsupported as i32, "portgroup vlan"),
    ] {
        let refused = update(&mut client, &network, command, portgroup, xml).await.unwrap_err();
        assert!(refused.0 == code && refused.1.contains(says), "{xml}: {refused:?}");
    }
    // A NIC that names none has the usual one's rate; one that does has its.
    let id = server.engine.network(&admin, "default", &name).unwrap().id;
    let limits = || {
        let hosts = server.host.network_hosts(id);
        let port = hosts.into_iter().find_map(|h| h.port).unwrap();
        (port.ingress_limit, port.egress_limit)
    };
    assert_eq!(limits(), (None, Some(525_000)));
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut devices = view.instance.devices.clone();
    let mut nic = view.expanded_devices["eth0"].clone();
    nic.insert("portgroup".into(), "fast".into());
    devices.insert("eth0".into(), nic.clone());
    let request = |devices| karst_engine::compute::update::UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    };
    let done =
        server.engine.instance_update(&admin, "default", "v1", request(devices.clone())).await.unwrap();
    assert_eq!(done.ended().await.error, None);
    tokio::time::timeout(crate::support::PATIENCE, async {
        while limits() != (Some(8_192_000), None) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("its group's rate");
    nic.insert("portgroup".into(), "none".into());
    devices.insert("eth0".into(), nic);
    let refused =
        server.engine.instance_update(&admin, "default", "v1", request(devices)).await.err().unwrap();
    assert_eq!(refused.field.as_deref(), Some("devices.eth0.portgroup"), "{refused}");
    // Changed and removed.
    let other =
        "<portgroup name='slow' default='yes'><bandwidth><outbound average='128'/></bandwidth></portgroup>";
    update(&mut client, &network, 1, portgroup, other).await.unwrap();
    assert!(dump(&mut client, &network).await.contains("average='128'"));
    update(&mut client, &network, 2, portgroup, "<portgroup name='slow'/>").await.unwrap();
    assert!(!dump(&mut client, &network).await.contains("slow"));
    // Interfaces of forwards.
    let interface = 7;
    for (command, xml, code, says) in [
        (1, "<interface dev='eth0'/>", Code::OperationUnsupported as i32, "only added or deleted"),
        (2, "<interface dev='eth0'/>", invalid, "couldn't find an interface entry"),
        (3, "<interface dev='eth0'/>", Code::ConfigUnsupported as i32, "interface"),
    ] {
        let refused = update(&mut client, &network, command, interface, xml).await.unwrap_err();
        assert!(refused.0 == code && refused.1.contains(says), "{xml}: {refused:?}");
    }
}
