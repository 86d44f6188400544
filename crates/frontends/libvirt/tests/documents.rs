//! Documents as they are written, whole.

use karst_frontend_libvirt::{
    session::Driver,
    xml::{capabilities, network},
};
use karst_model::{Name, NetworkId, ProjectId, network::Network, node::HostFacts};
use uuid::Uuid;

#[test]
fn capabilities_of_both_drivers() {
    let facts = HostFacts {
        architecture: "x86_64".into(),
        cpus: 2,
        memory: 4 << 30,
        default_machine: Some("pc-q35-7.2".into()),
        ..Default::default()
    };
    let node = Uuid::from_u128(7);
    insta::assert_snapshot!(
        "capabilities_qemu",
        capabilities::document(Driver::Qemu, &facts, node, None, &[])
    );
    insta::assert_snapshot!("capabilities_lxc", capabilities::document(Driver::Lxc, &facts, node, None, &[]));
}

#[test]
fn a_bridge() {
    let config = [
        ("ipv4.address", "10.1.2.1/24"),
        ("ipv4.nat", "true"),
        ("ipv6.address", "fd42:1:2:3::1/64"),
        ("bridge.mtu", "1400"),
    ];
    let network = Network {
        id: NetworkId(Uuid::from_u128(1)),
        project: ProjectId(Uuid::from_u128(2)),
        kind: Default::default(),
        name: Name::parse("name", "karstbr0").unwrap(),
        interface: None,
        description: String::new(),
        config: config.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        life: Default::default(),
        spec_version: 1,
    };
    insta::assert_snapshot!("network", network::document(&network, &[]).unwrap());
}
