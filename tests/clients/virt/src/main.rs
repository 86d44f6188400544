//! The `virt` crate as a client: what it says it can, done on one server, as an application of Rust does it. The first argument is the
//! URI, the second a network. It ends with what did not hold.

use std::collections::BTreeSet;
use virt::{
    connect::Connect, domain::Domain, domain_snapshot::DomainSnapshot, network::Network,
    storage_pool::StoragePool, storage_vol::StorageVol, stream::Stream, sys,
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const SIZE: usize = 1 << 20;

fn main() -> Outcome {
    let mut arguments = std::env::args().skip(1);
    let (uri, network) = arguments.next().zip(arguments.next()).ok_or("usage: virt-client URI NETWORK")?;
    let mut connection = Connect::open(Some(&uri))?;
    assert_eq!(connection.get_type()?, "QEMU");
    assert!(connection.is_alive()? && connection.is_secure()?);
    assert!(connection.get_lib_version()? >= 9_000_000, "{}", connection.get_lib_version()?);
    assert!(connection.get_capabilities()?.contains("<os_type>hvm</os_type>"));
    let node = connection.get_node_info()?;
    assert!(node.cpus > 0 && node.memory > 0);
    assert!(connection.get_free_memory()? > 0);
    let found = Network::lookup_by_name(&connection, &network)?;
    assert!(found.is_active()? && connection.list_networks()?.contains(&network));
    host(&connection)?;
    let volume = streams(&connection)?;
    machine(&connection, &network, &volume.get_path()?)?;
    volume.delete(0)?;
    connection.close()?;
    println!("all of it");
    Ok(())
}

/// Names of what there is agree with lookups.
fn host(connection: &Connect) -> Outcome {
    let pools: BTreeSet<_> = connection.list_storage_pools()?.into_iter().collect();
    for pool in connection.list_all_storage_pools(0)? {
        assert!(pools.contains(&pool.get_name()?) && pool.is_active()?);
        assert!(pool.get_info()?.capacity > 0);
    }
    let error =
        Domain::lookup_by_name(connection, "nobody").err().ok_or("there is a domain called nobody")?;
    assert_eq!(error.code(), virt::error::ErrorNumber::NoDomain, "{error:?}");
    assert!(error.message().contains("nobody"), "{error:?}");
    Ok(())
}

/// A volume, up and down again.
fn streams(connection: &Connect) -> Result<StorageVol, Box<dyn std::error::Error>> {
    let pool = StoragePool::lookup_by_name(connection, "default")?;
    let document = "<volume><name>of-rust</name><capacity unit='MiB'>16</capacity></volume>";
    let volume = StorageVol::create_xml(&pool, document, 0)?;
    let bytes: Vec<u8> = (0..SIZE).map(|n| (n * 7 % 251) as u8).collect();
    let up = Stream::new(connection, 0)?;
    volume.upload(&up, 4096, SIZE as u64, 0)?;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        rest = &rest[up.send(&rest[..rest.len().min(60_000)])?..];
    }
    up.finish()?;
    let down = Stream::new(connection, 0)?;
    volume.download(&down, 4096, SIZE as u64, 0)?;
    let (mut came, mut piece) = (vec![], vec![0; 65_536]);
    loop {
        match down.recv(&mut piece)? {
            0 => break,
            n => came.extend_from_slice(&piece[..n]),
        }
    }
    down.finish()?;
    assert!(came == bytes, "{} bytes came back", came.len());
    let beyond = Stream::new(connection, 0)?;
    let refused = volume.upload(&beyond, 1 << 40, 1, 0).and_then(|()| beyond.finish());
    assert!(refused.is_err(), "an upload beyond the end");
    Ok(volume)
}

fn machine(connection: &Connect, network: &str, disk: &str) -> Outcome {
    let document = format!(
        "<domain type='qemu'><name>of-rust</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>
        <os><type machine='q35'>hvm</type></os><devices>
        <disk type='file' device='disk'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
        <interface type='network'><source network='{network}'/><model type='virtio'/></interface>
        </devices></domain>"
    );
    let domain = Domain::define_xml(connection, &document)?;
    assert!(domain.is_persistent()? && !domain.is_active()?);
    assert_eq!(domain.get_os_type()?, "hvm");
    assert_eq!(Domain::lookup_by_uuid(connection, domain.get_uuid()?)?.get_name()?, "of-rust");
    assert!(connection.list_defined_domains()?.contains(&"of-rust".to_owned()));
    domain.set_autostart(true)?;
    assert!(domain.get_autostart()?);
    let title = sys::VIR_DOMAIN_METADATA_TITLE as i32;
    domain.set_metadata(title, Some("made by Rust"), None, None, 0)?;
    assert_eq!(domain.get_metadata(title, None, 0)?, "made by Rust");
    let snapshot =
        DomainSnapshot::create_xml(&domain, "<domainsnapshot><name>one</name></domainsnapshot>", 0)?;
    assert_eq!(snapshot.get_name()?, "one");
    assert_eq!(domain.list_all_snapshots(0)?.len(), 1);
    snapshot.delete(0)?;

    domain.create()?;
    let again = domain.create().err().ok_or("started twice")?;
    assert_eq!(again.code(), virt::error::ErrorNumber::OperationInvalid, "{again:?}");
    assert_eq!(domain.get_state()?.0, sys::VIR_DOMAIN_RUNNING);
    let id = Domain::lookup_by_name(connection, "of-rust")?.get_id().ok_or("it runs without a number")?;
    assert!(connection.list_domains()?.contains(&id));
    let info = domain.get_info()?;
    assert_eq!((info.max_mem, info.nr_virt_cpu), (256 << 10, 2));
    assert_eq!(domain.get_block_info("vda", 0)?.capacity, 16 << 20);
    domain.get_block_stats("vda")?;
    assert!(!domain.memory_stats(0)?.is_empty());
    let all = connection.get_all_domain_stats(0, 0)?;
    assert!(!all.is_empty());
    domain.suspend()?;
    assert_eq!(domain.get_state()?.0, sys::VIR_DOMAIN_PAUSED);
    domain.resume()?;
    assert_eq!(domain.get_state()?.0, sys::VIR_DOMAIN_RUNNING);
    let live = domain.get_xml_desc(0)?;
    assert!(live.contains("<alias name="), "{live}");
    let screen = Stream::new(connection, 0)?;
    let kind = domain.screenshot(&screen, 0, 0)?;
    let (mut picture, mut piece) = (vec![], vec![0; 65_536]);
    loop {
        match screen.recv(&mut piece)? {
            0 => break,
            n => picture.extend_from_slice(&piece[..n]),
        }
    }
    screen.finish()?;
    assert!(kind.starts_with("image/") && !picture.is_empty(), "{kind}");
    domain.destroy()?;
    assert_eq!(domain.get_state()?.0, sys::VIR_DOMAIN_SHUTOFF);
    domain.rename("of-rust-2", 0)?;
    domain.undefine()?;
    assert!(Domain::lookup_by_name(connection, "of-rust-2").is_err());
    Ok(())
}
