//! The contract of guest drivers, with a real virtual machine.

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_guest::contract::{Subject, run};
use std::{sync::Arc, time::Duration};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn virtual_machines_keep_the_contract() {
    let Some(place) = common::Place::new("contract") else {
        return;
    };
    let options = place.options();
    run(Subject {
        guest: place.guest(1),
        driver: Box::new(move || Arc::new(karst_vm_qemu::QemuDriver::new(options.clone()).unwrap())),
        boot: Duration::from_secs(600),
        streams: true,
    })
    .await;
    place.assert_clean();
}
